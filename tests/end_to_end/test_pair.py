"""What the main job promises, on real SGLang: default scheduler paths, both arms, every row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_probe.engine.releases import release
from sglang_probe.paths import shipped
from sglang_probe.run.run import Run, load_run
from sglang_probe.stats.distance import row_distance
from sglang_probe.studies.coverage.prompts import coverage_by_segment
from sglang_probe.verify.ownership import ORACLE_FILE, load_embedding
from sglang_probe.verify.reference import reference_errors
from sglang_probe.verify.verify import verify
from tests.amended import amend

pytestmark = pytest.mark.engine
MODEL = shipped("models/probe-text/checkpoint")


def test_every_invariant_holds_in_every_run(runs: dict[str, Run]) -> None:
    assert set(runs) == {"cache_on", "cache_off", "cache_on.repeat", "cache_off.repeat"}
    for run in runs.values():
        checks = verify(run, embedding=load_embedding(MODEL))
        assert [str(c) for c in checks if not c.holds] == []
        covers_nothing = [c.name for c in checks if c.covered == 0]
        assert (
            set(covers_nothing) <= {"rebinds"} if run.manifest["arm"].startswith("cache_on") else {"lineage", "rebinds"}
        )


def test_with_the_cache_on_shared_segments_are_covered_less_than_questions(runs: dict[str, Run]) -> None:
    coverage = coverage_by_segment(runs["cache_on"].tokens()).set_index("segment")["coverage"]
    assert coverage["system"] < 0.7
    assert coverage["exemplar"] < 0.7
    assert coverage["user"] > coverage["system"] + 0.2


def test_with_the_cache_off_every_prompt_position_is_computed(runs: dict[str, Run]) -> None:
    assert (coverage_by_segment(runs["cache_off"].tokens())["coverage"] == 1.0).all()


def test_reused_counts_equal_what_sglang_reports(runs: dict[str, Run]) -> None:
    spans, requests = runs["cache_on"].spans(), runs["cache_on"].requests()
    reused = spans[spans["status"] == "reused"]
    ours = (reused["end"] - reused["start"]).groupby(reused["rid"]).sum()
    theirs = requests.set_index("rid")["cached_tokens"]
    assert theirs.sum() > 0
    assert (theirs.index.map(ours).fillna(0) == theirs).all()


def test_sampled_outputs_are_reproduced_by_forcing(runs: dict[str, Run]) -> None:
    outputs = {name: [o.tolist() for o in run.requests()["output_ids"]] for name, run in runs.items()}
    assert outputs["cache_off"] == outputs["cache_on"]
    assert len({tuple(o) for o in outputs["cache_on"]}) > 5, "sampling at temperature 1 gave the same text throughout"


def test_a_stop_is_overshot_by_one_and_a_finish_by_length_where_the_release_does(runs: dict[str, Run]) -> None:
    run = runs["cache_on"]
    spans = run.spans()
    overshoot = spans[spans["phase"] == "overshoot"].groupby("rid").size()
    finish = run.requests().set_index("rid")["finish_reason"]
    assert {"stop", "length"} <= set(finish)
    overshot = {"stop", "length"} if release().overshoots_at_length else {"stop"}
    assert set(overshoot.index) == set(finish[finish.isin(overshot)].index)
    assert (overshoot == 1).all()


def test_the_long_prompts_were_prefilled_in_chunks(runs: dict[str, Run]) -> None:
    assert runs["cache_off"].spans()["chunk"].max() >= 1


def test_bf16_rows_agree_with_transformers_up_to_rounding(runs: dict[str, Run]) -> None:
    errors = reference_errors(runs["cache_off"], str(MODEL), requests=4)
    assert errors["hook_embed"].max() == 0.0
    assert np.median(errors["blocks.3.hook_resid_post"]) < 1e-2
    assert errors["blocks.3.hook_resid_post"].max() < 5e-2


def test_a_cached_harvest_is_lossless(runs: dict[str, Run]) -> None:
    """Every request's full matrix from the cached run, though it computed each shared prefix once."""
    cached, full = runs["cache_on"], runs["cache_off"]
    assert cached.manifest["rows"] < 0.6 * full.manifest["rows"]
    worst = 0.0
    for r in cached.requests().itertuples():
        for hook_point in cached.hook_points:
            a, b = cached.activations(r.rid, hook_point), full.activations(r.rid, hook_point)
            assert a.shape == b.shape == (r.prompt_len + r.output_len - 1, 256)
            if hook_point == "hook_embed":
                assert torch.equal(a, b)
            worst = max(worst, float(row_distance(a, b)[0].max()))
    assert worst < 5e-2  # bf16 rounding through four layers; the floor stands in the report


def test_batches_by_traffic_repeat_rows_as_often_as_they_were_reused(runs: dict[str, Run]) -> None:
    run = runs["cache_on"]
    tokens = run.tokens()
    tokens = tokens[tokens["phase"] != "overshoot"]
    unique = torch.cat(list(run.iter_batches("hook_embed", batch_size=100)))
    traffic = torch.cat(list(run.iter_batches("hook_embed", batch_size=100, weight="traffic")))
    assert len(unique) == (tokens["row"] >= 0).sum()
    assert len(traffic) == len(tokens)
    system = torch.cat(
        list(run.iter_batches("hook_embed", batch_size=100, weight="traffic", where="segment == 'system'"))
    )
    assert len(system) == (tokens["segment"] == "system").sum() > 0


def test_rows_shifted_by_one_position_are_noticed(runs: dict[str, Run], tmp_path: Path) -> None:
    """Negative control: shapes, counts and hashes all agree; only the content oracle can tell."""
    copy = tmp_path / "run"
    shutil.copytree(runs["cache_on"].path, copy)
    for shard in (copy / "rows" / "hook_embed").iterdir():
        rows = load_file(shard)["rows"]
        save_file({"rows": torch.roll(rows, 1, dims=0).contiguous()}, shard)
    amend(copy)
    violated = [c.name for c in verify(load_run(copy), embedding=load_embedding(MODEL)) if not c.holds]
    assert violated == ["content"]
    by_hash = verify(load_run(copy))
    (copy / ORACLE_FILE).unlink()
    amend(copy)
    by_consistency = verify(load_run(copy))
    assert [c.name for c in (*by_hash, *by_consistency) if not c.holds] == ["content", "consistency"]


def test_verify_names_the_first_violation_and_fails(cli: Callable, runs: dict[str, Run], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs["cache_on"].path, copy)
    shard = next((copy / "rows" / "hook_embed").iterdir())
    shard.write_bytes(shard.read_bytes()[:-2] + b"\0\1")
    done = cli("verify", copy, "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 1
    assert result["ok"] is False
    assert shard.name in next(c["violation"] for c in result["checks"] if c["name"] == "files")


def test_the_report_stands_alone_and_holds_the_numbers(pair: Path, runs: dict[str, Run]) -> None:
    html = (pair / "report.html").read_text()
    reused = runs["cache_on"].manifest["positions_by_status"]["reused"]
    assert f"{reused:,}" in html
    for forbidden in ("<script", "src=", 'http-equiv="refresh"', "@import"):
        assert forbidden not in html


def test_the_terminal_says_that_all_requests_reconcile(pair: Path) -> None:
    assert "in 40 of 40 requests" in (pair / "stdout.txt").read_text()


def test_a_run_moved_to_another_place_still_verifies_without_sglang(runs: dict[str, Run], tmp_path: Path) -> None:
    import subprocess
    import sys

    shutil.copytree(runs["cache_on"].path, tmp_path / "elsewhere")
    code = (
        "import sys; sys.modules['sglang'] = None\n"
        "import sglang_probe\nfrom sglang_probe.verify.verify import verify\n"
        f"run = sglang_probe.load_run({str(tmp_path / 'elsewhere')!r})\n"
        "assert all(c.holds for c in verify(run)), verify(run)\n"
        "assert run.rows('hook_embed', [0, 1]).shape == (2, 256)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
