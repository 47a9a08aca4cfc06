"""`sglang-probe coverage` writes what it says, on one run and on several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from sglang_probe.run.run import Run
from tests.conftest import Cli
from tests.studies.coverage.conftest import random_traffic, write_run

__all__ = ["write_run"]


def test_one_run(cli: Cli, write_run: Callable[..., Run]) -> None:
    run = write_run(*random_traffic(5))
    done = cli("coverage", run.path, "--axis", "segment", "--axis", "phase", "--by", "position")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "coverage by segment" in done.stdout
    assert "weights-phase-position.parquet" in done.stdout
    folder = run.path / "coverage"
    data = json.loads((folder / "summary.json").read_text())
    assert [m["axes"] for m in data["runs"][0]["maps"]] == [
        ["segment"],
        ["phase"],
        ["segment", "position"],
        ["phase", "position"],
    ]
    for m in data["runs"][0]["maps"]:
        weights = pd.read_parquet(folder / m["weights"])
        rows = (weights["end"] - weights["start"]).sum()
        assert rows == data["runs"][0]["totals"]["computed"]
    assert len(pd.read_parquet(folder / "tables" / "classes-segment.parquet")) == len(
        data["runs"][0]["maps"][0]["classes"]
    )
    html = (folder / "report.html").read_text()
    assert "Coverage by segment" in html
    assert data["runs"][0]["paragraph"].split(".")[0] in (folder / "coverage.md").read_text()


def test_several_runs_of_one_name_side_by_side(cli: Cli, write_run: Callable[..., Run], tmp_path: Path) -> None:
    first, second = write_run(*random_traffic(5), "x"), write_run(*random_traffic(6), "y")
    done = cli("coverage", first.path, second.path, "--output", tmp_path / "out", "--by", "none", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(done.stdout)
    assert [r["run"] for r in data["runs"]] == ["x", "y"]
    assert all((tmp_path / "out" / r["run"] / "weights-segment.parquet").exists() for r in data["runs"])
    assert "<html" in (tmp_path / "out" / "report.html").read_text()


def test_bad_input_is_told_in_a_sentence(cli: Cli, write_run: Callable[..., Run], tmp_path: Path) -> None:
    run = write_run(*random_traffic(5))
    for arguments, message in (
        ((run.path, "--axis", "segmant"), "did you mean `segment`?"),
        ((run.path, run.path), "give --output"),
        ((tmp_path,), "is not a run directory"),
        ((run.path, "--axis", "lexical"), "give the model's folder with --model"),
    ):
        done = cli("coverage", *arguments)
        assert done.returncode == 2
        assert message in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.stderr
