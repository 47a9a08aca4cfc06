"""The path that rows take on a GPU, in a real engine on the CPU (`simulated_graphs`).

Nothing is replayed here (test_graph_taps.py simulates that); decode steps only look so. What runs is
everything around it: taps set up when the model is loaded, one snapshot a forward, SGLang's copies of a result under
overlap scheduling, the join with the ledger at commit, a second recording in the same engine; and no tensor of the
engine is read by the host.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from sglang_probe.engine.releases import release
from sglang_probe.paths import shipped
from sglang_probe.run.hook_points import ATTENTION
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.reference import reference_errors
from sglang_probe.verify.verify import verify
from tests.attack.outcome import attack
from tests.attack.plan import TIGHT
from tests.end_to_end.telemetry_parity import SHARE, telemetry_differences

pytestmark = [pytest.mark.engine, pytest.mark.reviewed("accelerator rows")]
ROOT = Path(__file__).parents[2]
MODEL = shipped("models/probe-text/checkpoint")
POINTS = ["hook_embed", "blocks.3.hook_resid_post", *(f"blocks.3.{s}" for s in ATTENTION)]
MEASURED = ["blocks.0.attn.hook_rot_q", "blocks.0.attn.hook_rot_k"]
"""Captured in order to compute the telemetry again."""


def watching(folder: Path) -> dict[str, str]:
    """Environment in which a read of a tensor raises; the observations are counted in `watched.json`."""
    plugins = os.pathsep.join([str(ROOT), str(ROOT / "tests/engine/hooks/plugin")])
    return {"PYTHONPATH": plugins, "NO_DEVICE_READS": str(folder / "watched.json"), "SIMULATED_REPLAY": "1"}


@pytest.fixture(scope="module")
def folder(cli: Callable, write_yaml: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recordings in one engine, the second with forced outputs and without the cache; chunks, mixed batches."""
    folder = tmp_path_factory.mktemp("accelerator") / "experiment"
    config = write_yaml(
        "accelerator",
        dtype="float32",
        simulated_graphs=True,
        replicates=1,
        workload={"requests_per_family": 3},
        hook_points=[*POINTS, *MEASURED],
        telemetry={"layers": [0, 3], "every": 2, "memory": 3},
        sampling={"max_new_tokens": 16, "temperature": 1.0},
        server={"chunked_prefill_size": 128, "enable_mixed_chunk": True},
    )
    done = cli("ab", config, "--output", folder, **watching(folder.parent))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Run]:
    return {p.parent.name: load_run(p.parent) for p in folder.glob("*/manifest.json")}


def test_every_row_is_of_the_position_that_the_ledger_says(runs: dict[str, Run]) -> None:
    assert set(runs) == {"cache_on", "cache_off"}
    for run in runs.values():
        assert run.manifest["status"] == "complete"
        assert [str(c) for c in verify(run) if not c.holds] == []
        assert (run.forwards()["mode"] == "mixed").any()
        errors = reference_errors(run, str(MODEL), requests=6)
        assert set(errors) == {*POINTS, *MEASURED}
        assert sum(len(e) for e in errors.values()) == run.row_count() * (len(POINTS) + len(MEASURED))
        assert max(float(e.max()) for e in errors.values()) < 1e-4


def test_telemetry_that_is_never_waited_for_is_that_of_captured_rows(runs: dict[str, Run], tmp_path: Path) -> None:
    """Requests come and go, decode steps lie in mixed batches, and the second recording forgets the first's past."""
    for name, run in runs.items():
        worst = telemetry_differences(run, tmp_path / f"{name}.parquet")
        assert min(worst.loc["jump", "values"], worst.loc["top_weights", "values"]) > 100
        assert worst.loc["support", "max"] < 1e-4
        assert worst["max"].drop(["support", SHARE]).max() < 1e-5, worst
        assert worst.loc[SHARE, "max"] < 0.01
        measured = run.telemetry_table()["forward_id"].unique()
        assert set(run.forwards().set_index("forward_id").loc[measured, "mode"]) == {"decode", "mixed"}


def test_every_forward_says_whether_it_was_replayed(runs: dict[str, Run]) -> None:
    for run in runs.values():
        assert run.forwards().groupby("mode")["graph"].mean().to_dict() == {"decode": 1, "extend": 0, "mixed": 0}


def test_rows_of_two_recordings_in_one_engine_agree(runs: dict[str, Run]) -> None:
    """The taps outlive a recording, as they must where they are part of graphs."""
    on, off = runs["cache_on"], runs["cache_off"]
    for rid in on.requests()["rid"]:
        a, b = (run.activations(rid, "blocks.3.hook_resid_post") for run in (on, off))
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_no_tensor_of_the_engine_is_read_by_the_host(folder: Path, runs: dict[str, Run]) -> None:
    """A read would have raised inside the observation, and so have ended the recording with a fault."""
    watched = json.loads((folder.parent / "watched.json").read_text())
    assert {run.manifest.get("fault") for run in runs.values()} == {None}
    forwards = sum(len(run.forwards()) for run in runs.values())
    sent = ("_send", "_arrived") if release().version == "0.5.23" else ("travelling", "arrived")
    # 0.5.17 computes a step too many after a finish; a recording may close before its result is processed.
    unprocessed = len(runs) if release().overshoots_at_length else 0
    for name in ("_launch_recorded", "_launched", "_before", "_after"):
        assert watched[name] >= forwards, name
    for name in ("_commit", "_copy", *sent):
        assert watched[name] >= forwards - unprocessed, name
    query = "AcceleratorTelemetry._query_hook.<locals>.write_query"
    for name in (
        "_published",
        "_publishing",
        "_replace",
        "_write_sites",
        "_embed_hook.<locals>.write_embedding",
        query,
    ):
        assert watched[name] > 0, name


PLAN = {
    "server": TIGHT,
    "env": {},
    "cache": "on",
    "bypass": False,
    "pauses": False,
    "priorities": False,
    "refusals": False,
    "concurrency": 8,
    "samples": False,
    "hook_points": ["hook_embed"],
    "simulated_graphs": True,
    "refused": None,
}


@pytest.mark.slow
def test_random_traffic_keeps_every_row_its_owner(tmp_path: Path) -> None:
    """Aborts, pauses and retractions between the launch of a forward and the arrival of its rows."""
    outcome = attack(tmp_path, 2, 100, plan=PLAN | {"pauses": True, "refusals": True, "samples": True})
    assert outcome.noticed == [], outcome.output
    assert outcome.oracle["compared"] > 10_000


@pytest.mark.slow
def test_with_a_single_buffer_the_next_forward_overwrites_the_rows(tmp_path: Path) -> None:
    """Negative control, in a real engine: overlap scheduling launches a forward before it processes the last."""
    outcome = attack(tmp_path, 2, 40, sabotage="read the single buffer", plan=PLAN)
    assert any(text.startswith("content") for text in outcome.noticed), outcome.output


@pytest.mark.slow
@pytest.mark.parametrize("server", [{}, {"disable_overlap_schedule": True}], ids=["overlap", "no overlap"])
def test_delayed_samples_and_synchronous_scheduling(
    server: dict, cli: Callable, write_yaml: Callable[..., Path], tmp_path: Path
) -> None:
    """Constrained requests delay their sample, which clears SGLang's channel; without overlap it is another copy."""
    texts = [f"def f{i}(x, y):\n    return" for i in range(12)]
    lines = [{"prompt": t, "sampling_params": {"regex": "[a-z ]{20}"} if i % 2 else {}} for i, t in enumerate(texts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = write_yaml(
        "constrained",
        dtype="float32",
        simulated_graphs=True,
        hook_points=POINTS,
        sampling={"max_new_tokens": 30, "temperature": 1.0},
        server=server,
    )
    spec = yaml.safe_load(config.read_text()) | {
        "workload": {"source": "jsonl", "path": str(tmp_path / "prompts.jsonl")}
    }
    config.write_text(yaml.safe_dump(spec))
    done = cli("harvest", config, "--output", tmp_path / "run", **watching(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run(next(tmp_path.glob("run/**/manifest.json")).parent)
    assert [str(c) for c in verify(run) if not c.holds] == []
    errors = reference_errors(run, str(MODEL), requests=12)
    assert sum(len(e) for e in errors.values()) == run.row_count() * len(POINTS)
    assert max(float(e.max()) for e in errors.values()) < 1e-4
    delayed = json.loads((tmp_path / "watched.json").read_text()).get("attach", 0)
    if release().version == "0.5.23":
        assert (delayed > 0) == (not server)


@pytest.mark.slow
def test_some_positions_and_heads_only(cli: Callable, write_yaml: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing that no hook point keeps is sent; what is kept is of the positions and heads that were asked for."""
    config = write_yaml(
        "some",
        dtype="float32",
        simulated_graphs=True,
        hook_points=POINTS,
        rows={"window": 8, "decode": {"every": 3}, "heads": [1, 6], "kv_heads": [2]},
        sampling={"max_new_tokens": 16, "temperature": 1.0},
    )
    done = cli("harvest", config, "--output", tmp_path / "run", **watching(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run(next(tmp_path.glob("run/**/manifest.json")).parent)
    assert [str(c) for c in verify(run) if not c.holds] == []
    errors = reference_errors(run, str(MODEL), requests=10)
    assert 0 < len(errors["blocks.3.attn.hook_rot_q"]) < run.row_count()
    assert max(float(e.max()) for e in errors.values()) < 1e-4
