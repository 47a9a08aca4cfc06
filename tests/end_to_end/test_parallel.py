"""Tensor and data parallel 2: rows are whole and written once, and every data-parallel rank has a ledger of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.engine.releases import release
from sglang_probe.run import schema
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.reference import compare
from sglang_probe.verify.verify import verify
from tests.end_to_end.live_server import MODEL, LiveServer
from tests.end_to_end.steering import make_library

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not release().cpu_ranks, reason="this release starts one rank without an accelerator"),
]

HOOK_POINTS = ["hook_embed", "blocks.0.hook_resid_post", "blocks.3.hook_resid_post"]
BINDING = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


def _harvest(
    cli: Callable, write_yaml: Callable, path: Path, dtype: str, more: dict[str, Any] | None = None, **server: object
) -> Run:
    config = write_yaml(
        "parallel",
        workload={"families": 4, "requests_per_family": 4},
        sampling={"max_new_tokens": 12, "temperature": 0.0},
        hook_points=HOOK_POINTS,
        dtype=dtype,
        server={"chunked_prefill_size": 256, **server},
        **(more or {}),
    )
    done = cli("harvest", config, "--output", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_run(path)


def test_tensor_parallel_rows_are_whole_and_written_once(cli: Callable, write_yaml: Callable, tmp_path: Path) -> None:
    """All requests are plain in the most of their prompts, and then under interventions that add, and that read the
    residual stream."""
    library = make_library(tmp_path / "library")
    late = {"prompt_window": [-30, None]}
    steer = [
        {"vector": "up", "strength": 3.0, **late},
        {"vector": "late", "op": "project_out", **late},
        {"vector": "feature", "op": "clamp", "strength": 1.0, "unit": "p99", "generation_window": [2, 8], **late},
    ]
    own = {"steer": {"library": str(library.folder)}, "arm": {"steer": steer}}
    run = _harvest(cli, write_yaml, tmp_path / "run", "float32", own, tp_size=2)
    checks = {c.name: c for c in verify(run)}
    assert [str(c) for c in checks.values() if not c.holds] == []
    assert checks["interventions"].covered > 16 * 30
    assert set(run.spans()["dp_rank"]) == {0}
    # One rank's half of a sum, or of a row, or a change that one rank made alone, would be far from the reference.
    found = compare(run, str(MODEL), requests=4, vectors=list(library.values()))
    assert found.intervened == 4
    assert found.undecided < 100
    assert set(found.by_hook_point) == set(HOOK_POINTS)
    assert max(float(e.max()) for e in found.by_hook_point.values()) < 1e-4


def test_each_data_parallel_rank_has_its_ledger_and_the_reader_merges_them(
    cli: Callable, write_yaml: Callable, tmp_path: Path
) -> None:
    run = _harvest(cli, write_yaml, tmp_path / "run", "bfloat16", dp_size=2)
    assert [str(c) for c in verify(run) if not c.holds] == []
    spans, forwards = run.spans(), run.forwards()
    assert set(spans["dp_rank"]) == {0, 1}
    assert forwards["forward_id"].is_unique
    assert (forwards["forward_id"] // 2**schema.RANK_SHIFT == forwards["dp_rank"]).all()
    # A request runs on one rank, and what it reuses was computed there.
    rank_of = spans.groupby("rid")["dp_rank"].agg(["min", "max"])
    assert (rank_of["min"] == rank_of["max"]).all()
    reused = spans[spans["origin_rid"].notna()]
    assert len(reused) > 0
    assert (reused["dp_rank"] == reused["origin_rid"].map(rank_of["min"])).all()
    for rank in (0, 1):  # a request of either rank gets its rows, those of its origin included
        rid = reused.loc[reused["dp_rank"] == rank, "rid"].iloc[0]
        assert len(run.activations(rid, HOOK_POINTS[-1])) == len(run.tokens_of(rid).query("phase != 'overshoot'"))
    batches = list(run.iter_batches("hook_embed", batch_size=512))
    assert sum(len(b) for b in batches) == (run.tokens().query("phase != 'overshoot'")["row"] >= 0).sum()


@pytest.mark.slow
def test_a_live_server_of_two_ranks_records_both_and_answers_for_both(tmp_path: Path) -> None:
    server = LiveServer(tmp_path, "--dp-size", "2", "--load-balance-method", "round_robin", environment=BINDING)
    try:
        server.wait_until_ready()
        before = server.status()
        prompt = list(range(100, 160))
        for _ in range(6):
            server.generate(prompt)
        status = server.status()
        assert status["recording"] is True
        assert [rank["requests"] for rank in status["ranks"]] == [r["requests"] + 3 for r in before["ranks"]]
        recent = server.http.get("/probe/coverage?n=6").json()["recent"]
        assert sorted(r["dp_rank"] for r in recent) == [0, 0, 0, 1, 1, 1]
        # Each rank computed the prompt once and reused it twice: a cache is a rank's own.
        assert sorted(r.get("reused", 0) for r in recent) == [0, 0, 59, 59, 59, 59]
        series = server.anybody.get("/metrics").text
        assert {'dp_rank="0"', 'dp_rank="1"'} <= set(re.findall(r'sglang_probe:reused.*?(dp_rank="\d")', series))
        flushed = server.http.post("/probe/flush").json()
        assert flushed["flushed"] is True
        for rank, path in enumerate(flushed["segments"]):
            assert path == str(server.run / f"dp{rank}" / "segment-00000")
            segment = load_run(path)
            assert segment.manifest["dp_rank"] == rank
            assert [str(c) for c in verify(segment) if not c.holds] == []
    finally:
        server.kill()
