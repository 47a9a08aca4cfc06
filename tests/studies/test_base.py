"""Every study has the same flags, leaves the same files, and its summary alone goes to standard output."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import typer

from sglang_probe.cli.harvest import EXAMPLE
from sglang_probe.config import Config, load_config
from sglang_probe.errors import ConfigError
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.report.page import Page
from sglang_probe.report.tables import Table
from sglang_probe.studies import base
from sglang_probe.studies.catalogue import STUDIES
from sglang_probe.verify.check import Check

RECORDED = [s for s in STUDIES if isinstance(s, base.RecordedStudy)]
FLAGS = {"output", "overwrite", "resume", "report_only", "plan", "as_json", "skip_bad"}


def options_of(study: base.Study) -> set[str]:
    return set(inspect.signature(study.command()).parameters)


@pytest.mark.parametrize("study", STUDIES, ids=lambda s: s.name)
def test_every_study_says_what_it_answers_with_an_example_and_where_its_files_go(study: base.Study) -> None:
    assert options_of(study) >= {"output", "as_json"}
    text = inspect.getdoc(study.command()) or ""
    assert text.splitlines()[0].count("?") == 1
    assert f"Example: `sglang-probe {study.name} " in text


@pytest.mark.parametrize("study", RECORDED, ids=lambda s: s.name)
def test_every_study_that_records_has_every_flag(study: base.RecordedStudy) -> None:
    further = {"judge", "judge_model"} if study.name == "steer decay" else set()
    assert options_of(study) == FLAGS | {"experiment", "example", "schema"} | further


@pytest.mark.parametrize("study", RECORDED, ids=lambda s: s.name)
def test_the_example_is_a_yaml_that_the_study_takes_and_the_schema_explains_its_fields(
    study: base.RecordedStudy, tmp_path: Path
) -> None:
    file = tmp_path / "example.yaml"
    file.write_text(study.example)
    load_config(file, study.config())
    fields = study.config().model_json_schema()["properties"]
    assert sum("description" in f for f in fields.values()) >= 5


@pytest.mark.parametrize("study", RECORDED, ids=lambda s: s.name)
def test_every_study_that_records_says_in_runs_what_it_records(study: base.RecordedStudy) -> None:
    runs = study.runs()
    assert list(inspect.signature(runs.prepare).parameters) == ["config"]
    flags = ["overwrite", "resume", "reporter"]
    assert list(inspect.signature(runs.run).parameters) == ["prepared", "config", "folder", *flags]
    assert list(inspect.signature(runs.read).parameters) == ["config", "folder"]


def test_the_example_of_a_harvest_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "example.yaml"
    file.write_text(EXAMPLE)
    assert load_config(file, HarvestConfig).workload.source == "jsonl"


def test_malformed_lines_of_every_task_that_is_read_from_a_file_can_be_skipped(tmp_path: Path) -> None:
    study = next(s for s in RECORDED if s.name == "evict")
    retrieval = {"source": "retrieval", "task": "chase", "count": 2, "prompt_tokens": 228}
    given = {"methods": ["knorm"], "budgets": ["1/8"], "workloads": {"made": retrieval}}
    made = study.config().model_validate(given)
    with pytest.raises(ConfigError, match="no workload reads a file"):
        study.skipping_bad(made)
    mine = {"source": "jsonl", "path": str(tmp_path / "prompts.jsonl")}
    both = study.config().model_validate({**given, "workloads": {"made": retrieval, "mine": mine}})
    skipping: Any = study.skipping_bad(both)
    assert skipping.workloads["mine"].skip_bad
    assert skipping.workloads["made"] == both.workloads["made"]  # type: ignore[attr-defined]


@dataclass
class Found:
    ok: bool = True
    checks: dict[str, list[Check]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"name": "n", "value": np.float32(0.5), "missing": float("nan"), "list": (np.int64(1), pd.NA)}

    def tables(self) -> dict[str, pd.DataFrame]:
        return {"small": pd.DataFrame({"x": [1 / 3]}), "long": pd.DataFrame({"x": range(base.MOST_CSV_ROWS + 1)})}


class Given(Config):
    name: str | None = None
    output: Path = Path("runs")


class Noisy(base.RecordedStudy):
    """Is it quiet?

    Example: `sglang-probe noisy mine.yaml`
    """

    name: ClassVar[str] = "noisy"
    example: ClassVar[str] = "name: noisy"
    result: ClassVar[Found] = Found()
    done: ClassVar[list[str]] = []

    def config(self) -> type[Config]:
        return Given

    def runs(self) -> Any:
        return self

    def prepare(self, config: Any) -> None:
        self.done.append("prepare")

    def plan(self, prepared: Any, config: Any) -> base.Plan:
        return base.Plan(Table(pd.DataFrame({"run": ["one"]}), "plan"), 2, ["a note"])

    def run(self, prepared: Any, config: Any, folder: Path, **how: Any) -> dict[str, Any]:
        self.done.append("run")
        os.system("echo noise of an engine")
        return {}

    def read(self, config: Any, folder: Path) -> dict[str, Any]:
        self.done.append("read")
        return {}

    def study(self, found: Any, config: Any, folder: Path, name: str, tell: base.Tell) -> Found:
        return self.result

    def page(self, result: Found) -> Page:
        return Page("the page")

    def shown(self, result: Found) -> Iterable[Table | str]:
        return [Table(pd.DataFrame({"x": [1]}), "a table"), "a line"]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command of a study in this process; gives its exit code."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"output: {tmp_path}")
    monkeypatch.setattr(Noisy, "done", [])

    def run(*flags: str, study: base.Study | None = None) -> int:
        app = typer.Typer()
        app.command()((study or Noisy()).command())
        with pytest.raises(SystemExit) as exit_code:
            app([str(file), *flags])
        return int(exit_code.value.code or 0)

    return run


def summary_in(folder: Path) -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_a_study_leaves_a_report_a_summary_and_tables(call: Callable[..., int], tmp_path: Path) -> None:
    assert call() == 0
    folder = tmp_path / "mine"
    assert "<h1>the page</h1>" in (folder / "report.html").read_text()
    assert summary_in(folder) == {
        "study": "noisy",
        "ok": True,
        "name": "n",
        "value": 0.5,
        "missing": None,
        "list": [1, None],
    }
    assert {p.name for p in (folder / "tables").iterdir()} == {"small.csv", "small.parquet", "long.parquet"}
    assert pd.read_csv(folder / "tables" / "small.csv")["x"].tolist() == [1 / 3]


def test_with_json_the_summary_alone_is_on_standard_output(
    call: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == summary_in(tmp_path / "mine")
    assert "noise of an engine" in err
    assert "a table" in err
    assert "report:" in err


def test_a_plan_records_and_writes_nothing(
    call: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("--plan", "--json") == 0
    out, _ = capfd.readouterr()
    assert json.loads(out) == {"study": "noisy", "plan": [{"run": "one"}], "engine_starts": 2, "notes": ["a note"]}
    assert Noisy.done == ["prepare"]
    assert not (tmp_path / "mine").exists()


def test_report_only_prepares_and_records_nothing(call: Callable[..., int], tmp_path: Path) -> None:
    assert call("--report-only", "--output", str(tmp_path / "elsewhere")) == 0
    assert Noisy.done == ["read"]
    assert summary_in(tmp_path / "elsewhere")["ok"]


def test_a_violated_invariant_is_named_and_is_exit_code_1(
    call: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    class Violated(Noisy):
        result = Found(ok=False, checks={"run": [Check("tiling", "claim", 3, "requests", "request [r1] has a gap")]})

    assert call(study=Violated()) == 1
    assert "VIOLATED in run: tiling: request [r1] has a gap" in capfd.readouterr().out
