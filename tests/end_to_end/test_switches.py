"""A policy set in a running engine is the one it would have been started with; requests bypass the cache cleanly."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sglang_probe import bf16
from sglang_probe.engine.releases import release
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.families import WORTH_WAITING_FOR
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.pool import shared_length
from sglang_probe.harvest.prepare import Prepared, prepare
from sglang_probe.policy.arm import Arm
from sglang_probe.run.run import Run
from sglang_probe.verify.verify import verify

pytestmark = pytest.mark.engine
LAYER = "blocks.3.hook_resid_post"
ARMS = {
    "on": Arm(),
    "off": Arm(cache="off"),
    "off, chunks of 64": Arm(cache="off", server={"chunked_prefill_size": 64}),
    "mixed": Arm(server={"chunked_prefill_size": 64, "enable_mixed_chunk": True}),
    "on again": Arm(),
    "write only": Arm(cache="write_only"),
    "read only": Arm(cache="read_only"),
    "read only, chunks of 64": Arm(cache="read_only", server={"chunked_prefill_size": 64}),
    "lpm": Arm(server={"schedule_policy": "lpm"}),
}


def prepared(**fields: Any) -> Prepared:
    workload = {"source": "shared_prefix", "families": 2, "requests_per_family": 4, "exemplars": 2}
    sampling = {"max_new_tokens": 12, "temperature": 0.0}
    config = {"workload": workload, "sampling": sampling, "hook_points": ["hook_embed", LAYER], **fields}
    # One request at a time, so that equal policies give equal bits; one pool, so that they share an engine.
    own = {"concurrency": 1, "server": {"max_total_tokens": 65536}}
    return prepare(HarvestConfig.model_validate({**own, **config}), ARMS)


@pytest.fixture(scope="module", autouse=True)
def _stock_products() -> Iterator[None]:
    """SGLang's own attention, which ours is compared with bit by bit, is not widened on any CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(bf16.VARIABLE, "bf16")
        yield


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All arms in one engine, one after the other."""
    folder = tmp_path_factory.mktemp("switched")
    others = {p.pid for p in psutil.Process().children(recursive=True)}  # of other tests of this worker
    with EngineHost() as host, subprocess.Popen(["sleep", "1000"]) as of_the_caller, ExitStack() as last:
        last.callback(of_the_caller.kill)  # `Popen` would wait for it where a recording fails
        ours = prepared()
        requests, how = ours.workload.requests, {"asks": {"cache"}, "host": host}
        runs = record([RunSpec(n, requests, arm) for n, arm in ARMS.items()], ours, folder, **how)
        assert host.starts == 1
        several = prepared(concurrency=8, order="as_given")
        runs |= record([RunSpec("mixed", requests, ARMS["mixed"])], several, folder / "of 8", **how)
        of_families = prepared(concurrency=8, order="families")
        runs |= record([RunSpec("families", requests)], of_families, folder, **how)
        assert host.starts == 1
        engine = [p for p in psutil.Process().children(recursive=True) if p.pid not in others]
        host.stop()
        # SGLang of itself ends all children of the process that calls it.
        assert of_the_caller.poll() is None
        assert [p.name() for p in engine if p.is_running() and p.name().startswith("sglang::")] == []
    return runs


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same requests in an engine started without radix cache, with chunks of 64 and SGLang's own attention.

    Chunks after the first have a prefix, for which the default backend differs (`platform/attention.py`).
    """
    server = {"disable_radix_cache": True, "chunked_prefill_size": 64, "attention_backend": "torch_native"}
    ours = prepared()
    ours = replace(ours, config=ours.config.model_copy(update={"server": server}))  # past the check of a user's keys
    return record([RunSpec("run", ours.workload.requests)], ours, tmp_path_factory.mktemp("started"))["run"]


def _spans(run: Run) -> list[tuple[Any, ...]]:
    columns = ["rid", "attempt", "start", "end", "status", "phase", "chunk", "origin_rid"]
    spans = run.spans().sort_values(["rid", "start"])[columns]
    return [tuple(row) for row in spans.where(spans.notna(), None).itertuples(index=False)]


def test_every_invariant_holds_under_every_policy(switched: dict[str, Run]) -> None:
    for name, run in switched.items():
        assert [str(c) for c in verify(run) if not c.holds] == [], name


def test_what_requests_in_flight_together_share_is_computed_once(switched: dict[str, Run]) -> None:
    run = switched["families"]
    prompts = {r.rid: tuple(r.prompt_ids) for r in run.requests().itertuples()}
    reused = run.spans().query("status == 'reused'").groupby("rid")["end"].max()
    waited = 0
    for i, (rid, prompt) in enumerate(prompts.items()):
        shared = max((shared_length(prompt, p) for p in list(prompts.values())[:i]), default=0)
        if shared >= WORTH_WAITING_FOR:
            assert reused[rid] == min(shared, len(prompt) - 1)
            waited += 1
    assert waited >= 6, "all but the first of each of two families"
    assert (run.manifest["order"], switched["off"].manifest["order"]) == ("families", "as_given")


def test_a_switched_engine_computes_what_a_started_one_does(switched: dict[str, Run], started: Run) -> None:
    ours = switched["off, chunks of 64"]
    assert _spans(ours) == _spans(started)
    assert ours.spans()["chunk"].max() >= 2
    assert ours.manifest["server_resolved"]["attention_backend"] == release().cpu_attention[0]
    assert started.manifest["server_resolved"]["attention_backend"] == "torch_native"
    for run, chunk in ((ours, 64), (started, 64), (switched["on"], None)):
        resolved = run.manifest["server_resolved"]
        assert [name for name, value in resolved.items() if value is None] == []
        assert chunk is None or resolved["chunked_prefill_size"] == chunk
        assert resolved["disable_radix_cache"] is (run is not switched["on"])
        assert [w["number"] for w in run.manifest["weights"]] == [0]
    for rid in ours.requests()["rid"]:
        assert torch.equal(ours.activations(rid, LAYER), started.activations(rid, LAYER))


def test_switches_are_put_back(switched: dict[str, Run]) -> None:
    assert _spans(switched["on"]) == _spans(switched["on again"])
    assert (switched["off"].spans()["chunk"] <= 0).all()
    assert (switched["mixed"].forwards()["mode"] == "mixed").any()
    assert (switched["on again"].forwards()["mode"] != "mixed").all()


def test_the_cache_is_empty_when_a_recording_begins(switched: dict[str, Run]) -> None:
    for run in switched.values():
        spans = run.spans()
        assert spans.loc[spans["status"] == "reused", "origin_rid"].notna().all()


def test_what_is_not_read_is_computed_and_what_is_not_written_cannot_be_reused(switched: dict[str, Run]) -> None:
    assert (switched["on"].spans()["status"] == "reused").any()
    for name in ("off", "read only", "read only, chunks of 64", "write only"):
        assert (switched[name].spans()["status"] == "computed").all(), name
    # A request that writes only is repointed to equal entries of others; one that does not write never is.
    assert len(switched["write only"].rebinds()) > 0
    for name in ("off", "read only", "read only, chunks of 64"):
        assert len(switched[name].rebinds()) == 0, name


def test_one_request_may_read_what_another_wrote(tmp_path: Path) -> None:
    ours = prepared()
    first, second, third = ours.workload.requests[:3]
    params = {"max_new_tokens": 4, "temperature": 0.0}
    tell = lambda use: {**params, "custom_params": {"probe": {"cache": use}}}  # noqa: E731
    requests = [
        _as(first, 0, params),
        _as(first, 1, tell("read_only")),
        _as(first, 2, tell("off")),
        _as(second, 3, tell("read_only")),
        _as(second, 4, params),
        _as(third, 5, tell("write_only")),
    ]
    run = record([RunSpec("run", requests)], ours, tmp_path)["run"]
    assert [str(c) for c in verify(run) if not c.holds] == []
    spans = run.spans()
    reused = spans[spans["status"] == "reused"].groupby("rid")["end"].max().to_dict()
    prompts = [len(r.prompt_ids) for r in requests]
    assert reused["r000001"] == prompts[1] - 1
    assert "r000002" not in reused
    assert reused["r000003"] == reused["r000004"] < prompts[3] - 1  # number 3 left nothing behind for number 4
    assert "r000005" not in reused


def _as(request: Any, index: int, params: dict[str, Any]) -> Any:
    from dataclasses import replace

    return replace(request, index=index, rid=f"r{index:06d}", sampling_params=params)
