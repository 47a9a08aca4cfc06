"""The factorial end to end: cells behind a cached prompt, the floor of the identity cell, what an override moves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sglang_probe.run.run import load_run
from sglang_probe.studies.factorial import cells
from sglang_probe.verify.verify import verify
from tests.declared import run_commands

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.reviewed("positions", "eviction")]
PROMPTS, N = 6, 8


def test_every_cell_runs_behind_a_cached_prompt_and_the_identity_is_the_floor(cli: Callable, tmp_path: Path) -> None:
    config = tmp_path / "factorial.yaml"
    fields = {
        "workload": {"source": "documents", "count": PROMPTS, "chars": 500},
        "dtype": "float32",
        "layers": [0, 1, 2, 3],
        "evict_positions": [True, "zero"],
        "evict_steps": 8,
        "pseudo_tokens": N,
        "decode_steps": 12,
        "concurrency": 3,
    }
    config.write_text(yaml.safe_dump(fields))
    folder = tmp_path / "study"
    done = cli("factorial", config, "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("decoded", "resampled", "cells", "evicted"):
        assert [str(c) for c in verify(load_run(folder / name)) if not c.holds] == []
    treated = load_run(folder / "cells")
    spans = treated.last_attempt()
    pseudo = spans[spans["rid"].str.contains(".", regex=False)]
    assert pseudo["rid"].nunique() == PROMPTS * len(cells.all_cells())
    computed = pseudo[pseudo["status"] == "computed"]
    assert (computed["end"] - computed["start"]).sum() == N * computed["rid"].nunique()
    assert set(pseudo.loc[pseudo["status"] == "reused", "origin_rid"]) == set(treated.requests()["rid"].head(PROMPTS))

    rows = pd.read_parquet(folder / "tables" / "cells.parquet")
    mean = rows.groupby(["content", "position", "layer", "outcome"])["value"].mean()
    # The true tokens at the true positions are the decode queries themselves, up to rounding.
    assert mean.loc["real", "true", :, ["post", "pre", "pre_centred"]].min() > 1 - 1e-5
    # Before RoPE the first layer does not know where it stands, and behind it every cell does.
    same = mean.loc["real", :, 0, "pre"]
    assert same.min() > 1 - 1e-5
    assert mean.loc["real", "zero", 0, "post"] < 0.9
    assert mean.loc["random", "true", 0, "pre_centred"] < 0.5
    oracle = mean.loc["baseline", "oracle"]
    assert oracle.loc[:, "overlap@0.25"].min() == 1
    assert (oracle.loc[:, "mass@0.25"] >= mean.loc["filler", "true"].loc[:, "mass@0.25"]).all()

    # After an eviction: the full cache predicts what was decoded with it, and the set that decoding reads beats chance.
    after = rows[rows["outcome"].isin(["agreement", "nll"])].groupby(["outcome", "content", "position"])["value"].mean()
    assert after["agreement", "baseline", "full"] == 1
    assert after["nll", "baseline", "full"] == 0
    assert after["nll", "baseline", "oracle"] < after["nll", "baseline", "random"]
    assert after["agreement"].index.get_level_values("position").nunique() == 2 + 4
    curves = pd.read_parquet(folder / "tables" / "curves.parquet")
    mine = curves[(curves["layer"] == "all") & (curves["outcome"] == "mass@0.25")].set_index(["curve", "level"])
    assert mine.loc[("content", "real"), "distance"] < 1e-5
    assert mine.loc[("position", "+1"), "distance"] < mine.loc[("position", "zero"), "distance"]

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["ok"]
    assert summary["reused"] == 1
    assert "In DapQ&#39;s layout" in (folder / "report.html").read_text()
    again = cli("factorial", config, "--output", folder, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "starting SGLang" not in again.stdout
    read = ["factorial", str(config), "--output", str(folder), "--report-only"]
    assert list(run_commands([read]).values()) == [0]
