"""The phase study end to end: the same tokens at the same positions, by the path that each run is named after."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sglang_probe.run.run import load_run
from sglang_probe.studies.phase.rows import row_indices
from sglang_probe.verify.verify import verify
from tests.declared import run_commands

pytestmark = pytest.mark.engine
P, C = 40, 24


def test_three_runs_hold_the_same_positions_and_the_study_tells_them_apart(cli: Callable, tmp_path: Path) -> None:
    config = tmp_path / "phase.yaml"
    fields = {
        "workload": {"source": "documents", "count": 6, "chars": 500},
        "prompt_tokens": P,
        "continuation_tokens": C,
        "hook_points": ["hook_embed", "blocks.3.hook_resid_post"],
        "concurrency": 3,
    }
    config.write_text(yaml.safe_dump(fields))
    folder = tmp_path / "study"
    done = cli("phase", config, "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {p.parent.name: load_run(p.parent) for p in folder.glob("*/manifest.json")}
    assert set(runs) == {k + r for k in ("human", "decoded", "reforward") for r in ("", ".repeat")}
    ids, phases = {}, {}
    for name, run in runs.items():
        assert [str(c) for c in verify(run) if not c.holds] == []
        tokens = run.tokens()
        part = tokens[(tokens["position"] >= P) & (tokens["position"] < P + C)].sort_values(["rid", "position"])
        ids[name], phases[name] = part["token_id"].tolist(), set(part["phase"])
        texts, where = row_indices(run, P, P + C)
        assert where.shape == (len(texts), C)
    assert len(ids["human"]) == 6 * C
    assert ids["decoded"] == ids["reforward"] == ids["decoded.repeat"]
    assert ids["decoded"] != ids["human"] == ids["human.repeat"]
    assert phases["decoded"] == {"decode"}
    assert phases["reforward"] == phases["human"] == {"prefill"}
    result = json.loads((folder / "summary.json").read_text())
    assert result["ok"]
    numerics = {r["hook_point"]: r for r in result["numerics"]}
    assert numerics["hook_embed"]["verdict"] == "bit-identical"
    assert 0 < numerics["blocks.3.hook_resid_post"]["effect"] < 0.05
    assert "Prefill and decode" in (folder / "report.html").read_text()
    # What is there is not run again.
    again = cli("phase", config, "--output", folder, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "starting SGLang" not in again.stdout
    read = ["phase", str(config), "--output", str(folder), "--report-only"]
    assert list(run_commands([read]).values()) == [0]
