"""What a list of runs promises before an engine is started, and when nothing needs one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.errors import ConfigError, RunDirectoryError, UnsupportedError, WorkloadError
from sglang_probe.harvest import directory
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.experiment import RunSpec, record, resolve
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.job import Job, manifest_of, probe_config
from sglang_probe.harvest.kept_requests import KeptRequest, requests_of
from sglang_probe.harvest.prepare import Prepared, prepare
from sglang_probe.kept_set import Kept, write_kept
from sglang_probe.policy.arm import Arm
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.phase import runs as phase
from sglang_probe.studies.phase.config import PhaseConfig
from sglang_probe.workload.request import Request

PROMPT = {"prompt": "import json and say what it is good for"}


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may start one."""

    def refuse(*_args: Any) -> None:
        raise AssertionError("an engine was asked for")

    monkeypatch.setattr(EngineHost, "open", refuse)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    """Two requests and a line that is none, with captured queries."""
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(json.dumps(x) for x in (PROMPT, {"promt": ""}, PROMPT)))
    fields: dict[str, Any] = {"workload": {"source": "jsonl", "path": file, "skip_bad": True}}
    points = ["hook_embed", "blocks.0.attn.hook_rot_q"]
    return prepare(HarvestConfig.model_validate({**fields, "hook_points": points, "sampling": {"max_new_tokens": 4}}))


def job(prepared: Prepared, **fields: Any) -> Job:
    return resolve(RunSpec("run", fields.pop("requests", prepared.workload.requests), **fields), prepared, {})


def complete(path: Path, manifest: dict[str, Any]) -> Run:
    """A directory that says it holds what `manifest` says."""
    path.mkdir(parents=True)
    directory.write_manifest(path, {**manifest, "status": "complete"})
    return load_run(path)


def test_what_was_checked_does_not_change(prepared: Prepared) -> None:
    with pytest.raises(FrozenInstanceError):
        prepared.workload = replace(prepared.workload)  # type: ignore[misc]
    assert isinstance(prepared.workload.requests, tuple)


def test_arms_share_a_pool_and_resume_what_was_recorded_with_another(prepared: Prepared, tmp_path: Path) -> None:
    """Its size is no part of what must agree for a run to be resumed, and an arm that sets one keeps it."""
    longer = [replace(r, prompt_ids=r.prompt_ids * 200) for r in prepared.workload.requests]
    few, many = job(prepared), job(prepared, requests=longer[:1])
    assert few.pool is not None
    assert (
        few.pool
        == job(prepared, arm=Arm(cache="off")).pool
        == job(prepared, requests=prepared.workload.requests[:1]).pool
    )
    assert many.pool is not None
    assert many.pool > few.pool
    assert job(prepared, arm=Arm(server={"max_total_tokens": 2048})).pool is None
    assert "max_total_tokens" not in manifest_of(few, tmp_path)["server_given"]


def test_a_run_that_captures_nothing_claims_no_heads(prepared: Prepared, tmp_path: Path) -> None:
    assert manifest_of(job(prepared), tmp_path)["heads"] == {"blocks.0.attn.hook_rot_q": [8, 32]}
    bare = manifest_of(job(prepared, hook_points=[]), tmp_path)
    assert (bare["heads"], bare["hook_points"]) == ({}, {})
    manifest = {"schema_version": 4, "status": "complete", **bare}
    with pytest.raises(RunDirectoryError, match="no rows per head"):
        complete(tmp_path / "bare", manifest).heads("blocks.0.attn.hook_rot_q")


def test_every_run_says_how_many_lines_of_its_workload_were_skipped(prepared: Prepared, tmp_path: Path) -> None:
    first, _ = prepared.workload.requests
    for requests in (prepared.workload.requests, [first], requests_of([KeptRequest("r", first.prompt_ids)], {})):
        assert manifest_of(job(prepared, requests=requests), tmp_path)["lines_skipped"] == 1


def test_a_phase_study_tells_how_many_lines_were_skipped(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def recorded(specs: Sequence[RunSpec], ours: Prepared, folder: Path, **_how: Any) -> dict[str, Run]:
        told.append(manifest_of(resolve(specs[0], ours, {}), folder)["lines_skipped"])
        raise KeyboardInterrupt

    monkeypatch.setattr(phase, "record", recorded)
    fields = {"workload": prepared.workload.source, "prompt_tokens": 3, "continuation_tokens": 2}
    config = PhaseConfig.model_validate(fields)
    with pytest.raises(KeyboardInterrupt):
        phase.run(phase.prepare(config), config, tmp_path)
    assert told == [1]


def test_the_engine_honours_what_requests_arm_and_later_runs_ask(prepared: Prepared, tmp_path: Path) -> None:
    plain, asking = prepared.workload.requests
    asking = replace(asking, sampling_params=Ask(force=(1, 2)).into(asking.sampling_params))
    found = job(prepared, requests=[plain, asking], arm=Arm(cache="read_only"))
    assert found.asks == {"force", "cache"}
    told = probe_config(found, tmp_path, found.asks | {"positions"})
    assert told.asks == ["cache", "force", "positions"]
    assert Ask.of(found.asked(asking)) == Ask(force=(1, 2), cache="read_only")


def test_the_first_engine_honours_what_later_runs_are_given(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def opened(_host: EngineHost, _model: str, _server: dict[str, Any], probe: EngineProbeConfig, *_: int) -> None:
        told.append(probe.asks)
        raise KeyboardInterrupt

    monkeypatch.setattr(EngineHost, "open", opened)
    ours = prepared.workload.requests
    specs = [RunSpec("a", ours), RunSpec("b", ours, Arm(cache="read_only")), RunSpec("c", ours, outputs_of="a")]
    for count, asks in ((1, ["positions"]), (2, ["cache", "positions"]), (3, ["cache", "force", "positions"])):
        with pytest.raises(KeyboardInterrupt):
            record(specs[:count], prepared, tmp_path, asks={"positions"}, overwrite=True)
        assert told.pop() == asks


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([("a", None), ("a", None)], "two runs are named `a`"),
        ([("a", "b"), ("b", None)], "`outputs_of: b` is no earlier run"),
    ],
)
def test_runs_that_cannot_be_told_apart_or_come_too_early(
    specs: list[tuple[str, str | None]], said: str, prepared: Prepared, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        record([RunSpec(n, prepared.workload.requests, outputs_of=o) for n, o in specs], prepared, tmp_path)


def test_what_one_rank_would_do_alone_is_refused(prepared: Prepared) -> None:
    asking = [replace(r, sampling_params=Ask(force=(1,)).into(r.sampling_params)) for r in prepared.workload.requests]
    with pytest.raises(UnsupportedError, match="`force` with `tp_size: 2`: one rank alone"):
        job(prepared, requests=asking, arm=Arm(server={"tp_size": 2}), hook_points=["hook_embed"])
    job(prepared, arm=Arm(server={"tp_size": 2}), hook_points=["hook_embed"])


def test_overwrite_and_resume_contradict_each_other(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contradict"):
        record([RunSpec("a", prepared.workload.requests)], prepared, tmp_path, overwrite=True, resume=True)


def test_nothing_is_served_if_a_later_run_is_there_already(prepared: Prepared, tmp_path: Path) -> None:
    complete(tmp_path / "b", manifest_of(job(prepared), tmp_path / "b"))
    with pytest.raises(RunDirectoryError, match="--resume finishes"):
        record([RunSpec(n, prepared.workload.requests) for n in "ab"], prepared, tmp_path)
    assert not (tmp_path / "a").exists()


def test_a_complete_run_is_kept_and_one_of_something_else_refused_by_name(prepared: Prepared, tmp_path: Path) -> None:
    first, second = prepared.workload.requests
    spec = RunSpec("run", [first, second])
    complete(tmp_path / "run", manifest_of(resolve(spec, prepared, {}), tmp_path / "run"))

    def again(spec: RunSpec, **changed: Any) -> None:
        ours = replace(prepared, config=prepared.config.model_copy(update=changed))
        assert record([spec], ours, tmp_path, resume=True)["run"].complete

    again(spec)
    again(spec, concurrency=3)
    for changed, key in [
        (replace(spec, requests=[first]), "workload_digest"),
        (replace(spec, hook_points=["hook_embed"]), "hook_points"),
        (replace(spec, arm=Arm(cache="off")), "switches"),
        (replace(spec, order_seed=1), "submission_order"),
    ]:
        with pytest.raises(RunDirectoryError, match=f"run was recorded with another `{key}`"):
            again(changed)
    with pytest.raises(RunDirectoryError, match="another `dtype`"):
        again(spec, dtype="float32")


def test_kept_sets_of_a_model_that_was_not_reviewed_are_refused_before_an_engine_starts(
    prepared: Prepared, tmp_path: Path
) -> None:
    """Rows of its residual stream may be captured all the same."""
    write_kept(tmp_path / "kept", {"k": Kept(torch.ones(1, 4, 4, 3, dtype=torch.bool))})
    spec = RunSpec("run", requests_of([KeptRequest("mine", [1, 2, 3], "k")], {}), kept=tmp_path / "kept")
    config = prepared.config.model_copy(update={"hook_points": ["hook_embed"]})
    latent = replace(prepared, config=config, model=replace(prepared.model, architecture="DeepseekV3ForCausalLM"))
    with pytest.raises(UnsupportedError, match="kept sets of DeepseekV3ForCausalLM"):
        record([spec], latent, tmp_path)


def test_a_changed_kept_set_is_noticed_and_one_that_nobody_names_is_not(prepared: Prepared, tmp_path: Path) -> None:
    length = len(prepared.workload.requests[0].prompt_ids)
    keep = torch.ones(1, 4, 4, length, dtype=torch.bool)
    keep[..., 1] = False

    def spec(**others: torch.Tensor) -> RunSpec:
        sets = {"k": keep, **others}
        write_kept(tmp_path / "kept", {key: Kept(value) for key, value in sets.items()})
        asked = [KeptRequest("r", prepared.workload.requests[0].prompt_ids, key="k")]
        return RunSpec("run", requests_of(asked, {"max_new_tokens": 4}), kept=tmp_path / "kept")

    complete(tmp_path / "run", manifest_of(resolve(spec(), prepared, {}), tmp_path / "run"))
    record([spec(other=keep)], prepared, tmp_path, resume=True)
    with pytest.raises(RunDirectoryError, match="another `kept_digest`"):
        record([spec(k=keep.roll(1, -1))], prepared, tmp_path, resume=True)


def test_what_older_manifests_do_not_say_is_taken_on_trust() -> None:
    new = {"schema_version": 4, "forced_digest": "x", "kept_digest": "y", "dtype": "auto"}
    assert directory.difference({"schema_version": 3, "dtype": "auto"}, new) is None
    assert directory.difference({"schema_version": 3, "dtype": "float32"}, new) == "dtype"
    assert directory.difference({**new, "forced_digest": "z"}, new) == "forced_digest"


def test_requests_made_in_code_are_checked_by_name(prepared: Prepared) -> None:
    def asking(**probe: Any) -> list[Request]:
        first = replace(prepared.workload.requests[0], rid="mine", source=None)
        return [replace(first, sampling_params={"max_new_tokens": 4, "custom_params": {"probe": probe}})]

    for probe, said in [
        ({"force": [99999]}, r"request mine: custom_params\.probe\.force\[0\]: token 99999"),
        ({"forse": [1]}, "request mine: .*did you mean `force`"),
        ({"evict": "k"}, "request mine: `evict: k`, but the recording has no kept sets"),
    ]:
        with pytest.raises(ConfigError, match=said):
            job(prepared, requests=asking(**probe))
    with pytest.raises(WorkloadError, match=r"request mine: .* do not fit"):
        job(prepared, requests=[replace(asking()[0], sampling_params={"max_new_tokens": 5000})])
    with pytest.raises(ConfigError, match="ids of the requests of a run must differ"):
        job(prepared, requests=[*asking(), *asking()])


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., HarvestConfig]:
    def write(*asked: Any, **options: Any) -> HarvestConfig:
        file = tmp_path / "asked.jsonl"
        records = [{**PROMPT, "sampling_params": {"max_new_tokens": 4, "custom_params": c}} for c in asked]
        file.write_text("\n\n".join(map(json.dumps, [PROMPT, *records, PROMPT])))
        return HarvestConfig.model_validate({"workload": {"source": "jsonl", "path": file, **options}})

    return write


@pytest.mark.parametrize(
    ("custom", "said"),
    [
        ([1], "`custom_params` is a mapping, not list"),
        ({"probe": [1]}, r"`custom_params\.probe` is a mapping, not list"),
        ({"probe": {"cache": "of"}}, "'read_only', 'write_only' or 'off'"),
        ({"probe": {"force": [1, 3072]}}, r"force\[1\]: token 3072 is not within the vocabulary of 3072"),
        ({"probe": {"positions": {"from": 4, "to": 4095}}}, "context of 4096"),
        ({"probe": {"system": [[0, 3]]}}, "nothing reads it without `telemetry`"),
        ({"probe": {"provenance": True}}, "a live server answers it"),
    ],
)
def test_a_line_that_asks_for_what_it_cannot_have_is_named_or_passed_over(
    custom: Any, said: str, lines: Callable[..., HarvestConfig]
) -> None:
    with pytest.raises(ConfigError, match=rf"asked\.jsonl:3: .*{said}(.|\n)*skip_bad: true"):
        prepare(lines(custom))
    found = prepare(lines(custom, {"probe": {"cache": "off"}}, skip_bad=True)).workload
    assert found.skipped == 1
    assert [(r.index, r.rid) for r in found.requests] == [(0, "r000000"), (1, "r000001"), (2, "r000002")]
    assert prepare(lines(custom, skip_bad=True, limit=2)).workload.requests[1].prompt_ids


def test_a_line_may_name_a_kept_set_that_a_run_will_bring(lines: Callable[..., HarvestConfig]) -> None:
    naming = {"probe": {"evict": "k"}}
    with pytest.raises(ConfigError, match=r"asked\.jsonl:3: `evict: k`, but .* no kept sets"):
        prepare(lines(naming))
    assert prepare(lines(naming, skip_bad=True)).workload.skipped == 1
    assert prepare(lines(naming), kept_later=True).workload.requests[1].ask.evict == "k"
