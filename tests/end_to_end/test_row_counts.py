"""The row-count study end to end: every forward has the number of rows that its name says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sglang_probe.run.run import load_run
from tests.declared import run_commands

pytestmark = pytest.mark.engine
PREFIX, COUNTS, BATCHES, STEPS = 24, [1, 2, 5, 16], [1, 3], 2


def test_the_same_tokens_are_computed_in_forwards_of_all_sizes(cli: Callable, tmp_path: Path) -> None:
    config = tmp_path / "rows.yaml"
    fields = {
        "workload": {"source": "documents", "count": 4, "chars": 300},
        "dtype": "float32",
        "prefix_tokens": PREFIX,
        "row_counts": COUNTS,
        "decode_batches": BATCHES,
        "decode_steps": STEPS,
        "hook_points": ["hook_embed", "blocks.0.attn.hook_v", "blocks.3.hook_resid_post"],
    }
    config.write_text(yaml.safe_dump(fields))
    folder = tmp_path / "study"
    done = cli("row-counts", config, "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("starting SGLang") == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["ok"]

    tails = load_run(folder / "tails")
    forwards = tails.forwards().set_index("forward_id")
    spans = tails.spans()
    for rid, mine in spans.groupby("rid"):
        text, _, count = str(rid).partition("-")
        if count == "prefix":
            continue
        reused = mine[mine["status"] == "reused"]
        assert (reused["start"].min(), reused["end"].max()) == (0, PREFIX)
        assert set(reused["origin_rid"]) == {f"{text}-prefix"}
        computed = mine[mine["status"] == "computed"]
        assert forwards.loc[computed["forward_id"], "prefill_tokens"].tolist() == [int(count)]

    distances = summary["distances"]
    for phase, counts in (("prefill", COUNTS), ("decode", BATCHES), ("prefix", [PREFIX])):
        assert sorted({d["rows"] for d in distances if d["phase"] == phase}) == counts
    again = [d for d in distances if d["phase"] == "repeat"]
    assert [(d["identical"], d["l2"]) for d in again] == [(1.0, 0.0)] * 3
    embedded = [d for d in distances if d["hook_point"] == "hook_embed"]
    assert {d["identical"] for d in embedded} == {1.0}
    assert 0 < max(d["l2_max"] for d in distances) < 1e-4
    # A forward of one row is a forward of one row, whether it is called prefill or decode.
    one = [c for c in summary["classes"] if "1" in c["prefill"].split(", ")]
    assert all("1" in c["decode"].split(", ") for c in one)
    read = ["row-counts", str(config), "--output", str(folder), "--report-only"]
    assert list(run_commands([read]).values()) == [0]
