"""`sglang-probe evict` end to end on the built-in models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sglang_probe.kept_set import KeptFile
from sglang_probe.run.run import load_run
from sglang_probe.studies.evict.asked import ALL_KEPT, FULL_CACHE
from sglang_probe.verify.verify import verify
from tests.declared import run_commands

pytestmark = pytest.mark.engine

COMMON = {"budgets": ["1/4", "1/2"], "trivial": {"sinks": 4, "window": 8}}
SNAPKV = {"method": "snapkv", "window": 8, "pooling": "none"}


def write(path: Path, **fields: object) -> Path:
    path.write_text(yaml.safe_dump({**COMMON, **fields}))
    return path


def test_offline_alone_starts_one_engine_and_judges_every_method(cli: Callable, tmp_path: Path) -> None:
    config = write(
        tmp_path / "text.yaml",
        workloads={"text": {"source": "documents", "count": 4, "chars": 700}},
        cut={"prompt_tokens": 96, "question_tokens": 8, "steps": 6},
        methods=["knorm", SNAPKV, {**SNAPKV, "per_query_head": True}, "laq"],
        oracles=["static_mean"],
        in_engine=False,
    )
    folder = tmp_path / "study"
    done = cli("evict", config, "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("starting SGLang") == 1
    offline = pd.read_parquet(folder / "tables" / "offline.parquet")
    equal = offline[(offline["metric"] == "prompt_mass") & ~offline["kind"].isin(["control", "published"])]
    recall = equal.set_index(["protocol", "policy", "budget"])["mean"]
    for protocol in ("query_visible", "query_hidden"):
        for budget in ("1/4", "1/2"):
            cell = recall[protocol].xs(budget, level="budget")
            assert cell.drop("snapkv pooling none, window 8, per query head").idxmax() == "static_mean"
            assert cell["snapkv pooling none, window 8"] > cell["protected random"]
    both = pd.read_parquet(folder / "tables" / "protection.parquet")
    assert set(both["policy"]) == {"knorm", *(p for p in recall.index.unique("policy") if p.startswith("snapkv"))}
    controls = offline[(offline["kind"] == "control") & (offline["metric"] == "nontrivial")]
    shuffled = controls[controls["policy"] == "snapkv pooling none, window 8: shuffled keys"]
    assert len(shuffled)
    assert (shuffled["mean"] - shuffled["chance"]).abs().max() < 0.1
    excluded = pd.read_parquet(folder / "excluded.parquet")
    assert set(excluded["policy"]) == {"laq"}
    assert not list(folder.glob("*.kept.safetensors"))
    html = (folder / "report.html").read_text()
    assert "Negative controls" in html
    assert "Equal terms" in html
    assert "The cache of the engine has one set for each kv head" in html
    read = ["evict", str(config), "--output", str(folder), "--report-only"]
    assert list(run_commands([read]).values()) == [0]


@pytest.mark.slow
@pytest.mark.reviewed("eviction")
def test_what_is_generated_from_kept_sets_is_judged_and_resumed(cli: Callable, tmp_path: Path) -> None:
    tasks = {t: {"source": "retrieval", "task": t, "count": 6, "prompt_tokens": 120} for t in ("recall", "chase")}
    tasks["recall"]["answers"] = tasks["chase"]["answers"] = 4
    config = write(
        tmp_path / "recall.yaml",
        model="probe-recall",
        workloads=tasks,
        methods=[
            "random",
            "keydiff",
            {"method": "laq", "recent": 8, "pooling": "none"},
            {"method": "dapq", "steps": 6},
            {"method": "speckv", "steps": 6, "window": 8},
            {"method": "quest", "dense_layers": 0},
        ],
        oracles=["static_max", "need_set"],
        needed=True,
        decode=[{"temperature": 0}, {"temperature": 0.7, "repeats": 2}],
    )
    folder = tmp_path / "study"
    done = cli("evict", config, "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    # Per task and prompt: the full cache once, and the sanity row under each protocol.
    assert summary["sanity"] == {"requests": 2 * 6 * 3, "exact": 2 * 6 * 3}
    for task in tasks:
        asked = pd.read_parquet(folder / f"{task}.greedy.asked.parquet")
        kept = KeptFile(folder / f"{task}.kept.safetensors")
        random = asked[(asked["policy"] == "random") & (asked["budget"] == "1/4")]
        for r in random.itertuples():
            length = 120 if r.protocol == "query_visible" else 118
            assert kept[r.key].length == length
            assert set(kept[r.key].counts_SYG.flatten().tolist()) == {round(length / 4 + 1e-9)}
        run = load_run(folder / f"{task}.greedy")
        assert [str(c) for c in verify(run) if not c.holds] == []
        outputs = run.requests().set_index("rid")["output_ids"]
        full = load_run(folder / f"{task}.full").requests().set_index("rid")["output_ids"]
        for r in asked[asked["policy"].isin([FULL_CACHE, ALL_KEPT])].itertuples():
            assert list(outputs[r.rid]) == list(full[r.source])
    outcomes = pd.DataFrame(summary["outcomes"]["greedy"])
    outcomes = outcomes[(outcomes["kind"] != "published") | (outcomes["policy"] == "random")]
    accuracy = outcomes[outcomes["metric"] == "accuracy"].set_index(["task", "protocol", "policy", "budget"])["mean"]
    for task in tasks:
        for protocol in ("query_visible", "query_hidden"):
            assert accuracy[task, protocol, FULL_CACHE, "1"] > 0.9
            assert accuracy[task, protocol, "need_set", "1/2"] > accuracy[task, protocol, "random", "1/2"]
    needed = pd.read_parquet(folder / "needed.parquet")
    assert set(needed["rid"]) == {f"r{i:06d}" for i in range(6)}
    offline = pd.DataFrame(summary["offline"])
    kept = offline[offline["metric"] == "needed_kept"].set_index(["task", "protocol", "policy", "budget"])["mean"]
    for task in tasks:
        for protocol in ("query_visible", "query_hidden"):
            assert kept[task, protocol, "need_set", "1/2"] == 1
            assert 0.2 < kept[task, protocol, "random", "1/2"] < 0.8
    assert "quest" not in accuracy.index.get_level_values("policy")
    assert {"laq", "dapq", "speckv"} <= set(accuracy.index.get_level_values("policy"))
    forced = pd.DataFrame(summary["outcomes"]["forced"])
    forced = forced[(forced["kind"] != "published") | (forced["policy"] == "random")]
    forced = forced.set_index(["metric", "task", "protocol", "policy", "budget"])
    for task in tasks:
        nll = forced.loc[("nll", task, "query_visible")]["mean"]
        assert nll[FULL_CACHE, "1"] == pytest.approx(nll[ALL_KEPT, "1"], abs=1e-3)
        assert nll["random", "1/4"] > nll["random", "1/2"] > nll[FULL_CACHE, "1"]
    html = (folder / "report.html").read_text()
    assert "Which metric predicts accuracy?" in html
    again = cli("evict", config, "--output", folder, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "starting SGLang" not in again.stdout
    assert json.loads((folder / "summary.json").read_text())["outcomes"] == summary["outcomes"]
    other = write(tmp_path / "other.yaml", **{**yaml.safe_load(config.read_text()), "budgets": ["1/4"]})
    refused = cli("evict", other, "--output", folder, "--resume")
    assert refused.returncode == 2
    assert "another `budgets`" in refused.stderr
