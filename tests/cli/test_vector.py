"""`sglang-probe vector` on runs that are there, without an engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sglang_probe.cli import app
from sglang_probe.errors import ConfigError
from sglang_probe.paths import shipped
from sglang_probe.steering.library import Library
from sglang_probe.steering.make import Target, random_control
from tests.steering.conftest import POINT, MakeRun, rows_run  # noqa: F401


def invoke(*words: str | Path) -> str:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["vector", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def row(rid: str, position: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(rid[1:]) * 100 + position)
    return torch.randn(8, generator=generator) + (torch.eye(8)[0] * 6 if rid[0] == "p" else 0)


@pytest.fixture
def both(rows_run: MakeRun) -> list[str]:  # noqa: F811
    runs = [rows_run(s, {f"{s}{i:02}": (4, 3) for i in range(40)}, row) for s in "pn"]
    return ["--positive", str(runs[0].path), "--negative", str(runs[1].path), "--hook-point", POINT]


def test_a_library_is_made_and_shown(both: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    card = json.loads(invoke("make", "mean-difference", "v", "--library", folder, *both, "--json"))
    assert card["evidence"]["held_out_auc"]["low"] > 0.8
    assert card["made_by"]["phase"] == "prefill"
    decode = ["--phase", "decode", "--overwrite", "--json"]
    again = json.loads(invoke("make", "mean-difference", "v", "--library", folder, *both, *decode))
    assert again["made_by"]["phase"] == "decode"
    assert again["made_by"]["inputs"]["position"] == "mean"
    assert again["hash"] != card["hash"]
    invoke("make", "probe", "gate", "--library", folder, *both, "--fpr", "0.1")
    invoke("make", "random", "r", "--library", folder, "--run", both[1], "--like", "v", "--seed", "4")
    library = Library.open(folder)
    assert {v.name: v.card.kind for v in library.values()} == {"gate": "probe", "r": "direction", "v": "direction"}
    assert library["r"].card.norm == pytest.approx(library["v"].card.norm)
    listed = invoke("list", folder)
    assert all(v.name in listed and v.hash[:12] in listed for v in library.values())
    assert {c["name"]: c["hash"] for c in json.loads(invoke("list", folder, "--json"))} == {
        v.name: v.hash for v in library.values()
    }
    said = invoke("show", folder, "gate")
    assert "held out auc: 1" in said
    assert "95 % interval" in said
    assert "roc" not in said


def refused(*words: str | Path) -> str:
    with pytest.raises(ConfigError) as e:
        CliRunner().invoke(app, ["vector", "make", *map(str, words)], catch_exceptions=False)
    return str(e.value)


def test_a_whole_sae_is_an_entry_without_a_norm_and_no_random_direction_is_a_control_for_it(tmp_path: Path) -> None:
    sae, folder = shipped("models/sae-probe-text/seed-0"), tmp_path / "vectors"
    card = json.loads(invoke("make", "sae", "whole", sae, "--library", folder, "--json"))
    assert (card["kind"], card["norm"], card["sae"]["folder"]) == ("sae", None, "whole")
    assert card["evidence"]["explained_variance"] == pytest.approx(0.818, abs=1e-3)
    assert "whole" in invoke("list", folder)
    assert "folder: whole" in invoke("show", folder, "whole")
    with pytest.raises(ConfigError, match="`whole` is an SAE, and a random direction is no control"):
        random_control(Target(folder, "r"), None, "", seed=0, like=Library.open(folder)["whole"])  # type: ignore


def test_what_cannot_be_written_is_refused_before_prompts_are_read(both: list[str], tmp_path: Path) -> None:
    missing = ["--positive", "none.jsonl", "--negative", "none.jsonl"]
    at = ["--library", str(tmp_path / "vectors"), "--hook-point"]
    assert "is no name of a vector" in refused("mean-difference", "a/b", *at, POINT, *missing)
    assert "not in the residual stream" in refused("mean-difference", "v", *at, "blocks.0.attn.hook_q", *missing)
    assert "none.jsonl is no set of prompts" in refused("mean-difference", "v", *at, POINT, *missing)
    invoke("make", "mean-difference", "v", "--library", tmp_path / "vectors", *both)
    assert "has a vector `v` already" in refused("probe", "v", *at, POINT, *missing)
    assert "no vector `w`" in refused("random", "r", *at[:2], "--run", both[1], "--like", "w")
    assert "there is no hook point" in refused("random", "r", *at[:2], "--run", both[1])
    assert "needs 39 held-out negative" in refused("probe", "p", *at[:2], *both, "--fpr", "0.025")
