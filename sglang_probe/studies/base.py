"""What a study is, and the command that is made from it.

A study is one folder: `config.py` (its YAML), `runs.py` (what is recorded), `study.py` (what it means), `page.py` (its
report), and `command.py`, one class on top of `Study` or `RecordedStudy`; `catalogue.py` lists them. Every command has
the same flags and leaves the same files in its folder: `report.html`, `summary.json` and `tables/`.

This file and every `command.py` are loaded when the command line starts, so they import the rest inside functions.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import typer

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from sglang_probe.config import Config
    from sglang_probe.report.page import Page
    from sglang_probe.report.tables import Table
    from sglang_probe.run.run import Run
    from sglang_probe.verify.check import Check

REPORT, SUMMARY = "report.html", "summary.json"
MOST_CSV_ROWS = 20_000
"""Longer tables are written as Parquet alone."""

Parameter = inspect.Parameter
Tell = Callable[[str], None]


class Result(Protocol):
    """What a study found."""

    @property
    def ok(self) -> bool:
        """Whether the numbers can be used; if not, the command ends with exit code 1."""

    @property
    def checks(self) -> Mapping[str, Sequence[Check]]:
        """Invariants of each run."""

    def to_json(self) -> dict[str, Any]:
        """The summary, as plain data."""

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Every table by name."""


class Measured:
    """Base of a `Result` that is a measurement: whatever was found can be used, and no run is verified."""

    @property
    def ok(self) -> bool:
        """It was measured; a finding is no failure."""
        return True

    @property
    def checks(self) -> Mapping[str, Sequence[Check]]:
        """Nothing is verified here."""
        return {}


@dataclass(frozen=True)
class Plan:
    """What would be recorded."""

    table: Table
    """A row per run, or per task."""
    starts: int
    """How often SGLang is started."""
    notes: Sequence[str] = ()


class Study(ABC):
    """A study of runs that are there. The docstring of a subclass is the help of its command.

    `obtain` reads what the parameters name, `page` and `shown` say how the result is presented.
    """

    name: ClassVar[str]
    """Of the command."""

    @abstractmethod
    def parameters(self) -> list[Parameter]:
        """Arguments and options of the command beside `--output` and `--json`."""

    @abstractmethod
    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[Result, Path] | Plan:
        """The result and the folder that it belongs to, or a plan, if no more was asked."""

    @abstractmethod
    def page(self, result: Any) -> Page:
        """The report."""

    @abstractmethod
    def shown(self, result: Any) -> Iterable[Table | str]:
        """What the terminal shows: tables, and lines of text."""

    def command(self) -> Callable[..., None]:
        """The function that the command line registers."""

        def command(**given: Any) -> None:
            self._call(given.pop("as_json"), given)

        command.__doc__ = inspect.cleandoc(type(self).__doc__ or "")
        signature = inspect.Signature([*self.parameters(), _JSON])
        command.__signature__ = signature  # type: ignore[attr-defined]
        return command

    def write(self, result: Result, folder: Path) -> dict[str, Any]:
        """Write report, summary and tables; returns the summary."""
        from sglang_probe.report.page import TABLES, write
        from sglang_probe.run import journal

        summary: dict[str, Any] = plain({"study": self.name, "ok": result.ok, **result.to_json()})
        folder.mkdir(parents=True, exist_ok=True)
        write_tables(result.tables(), folder / TABLES)
        journal.write_text_durably(folder / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
        write(self.page(result), folder / REPORT)
        return summary

    def _call(self, as_json: bool, given: Mapping[str, Any]) -> None:
        from rich.console import Console

        with _diverted_output() if as_json else nullcontext():
            console = Console(stderr=as_json)
            found = self.obtain(given, console)
            if isinstance(found, Plan):
                answer, ok = self._planned(found), True
            else:
                result, folder = found
                with console.status("writing the report"):
                    answer, ok = self.write(result, folder), result.ok
                self._tell(result, folder, console)
        if as_json:
            typer.echo(json.dumps(answer, indent=1, allow_nan=False))
        raise typer.Exit(0 if ok else 1)

    def _planned(self, plan: Plan) -> dict[str, Any]:
        rows = plan.table.frame.to_dict("records")
        return plain({"study": self.name, "plan": rows, "engine_starts": plan.starts, "notes": list(plan.notes)})

    def _tell(self, result: Result, folder: Path, console: Console) -> None:
        from sglang_probe.studies.pages import checks_in_words
        from sglang_probe.verify.check import all_hold

        show(console, self.shown(result))
        for run, checks in result.checks.items():
            for c in checks:
                if not c.holds:
                    console.print(f"[bold red]VIOLATED[/] in {run}: {c.name}: ", end="")
                    console.print(c.violation, markup=False, highlight=False, soft_wrap=True)
        if result.checks and all_hold(result.checks):
            console.print(f"[green]{checks_in_words(result.checks)}[/]")
        console.print(f"report: [bold]{folder / REPORT}[/]", soft_wrap=True)


class RecordedStudy(Study):
    """A study that records its own runs, as a YAML file says."""

    example: ClassVar[str]
    """A YAML to start from, with comments."""

    @abstractmethod
    def config(self) -> type[Config]:
        """What the YAML is read as."""

    @abstractmethod
    def plan(self, prepared: Any, config: Any) -> Plan:
        """What would be recorded."""

    @abstractmethod
    def study(self, found: Any, config: Any, folder: Path, name: str, tell: Tell) -> Result:
        """What the runs say."""

    def runs(self) -> Any:
        """`runs.py` of the study's folder: `prepare(config)` checks everything that can be checked before an engine
        starts; `run(prepared, config, folder, *, overwrite, resume, reporter)` records and `read(config, folder)` reads
        what was recorded, both with the same result."""
        return import_module(f"{type(self).__module__.rpartition('.')[0]}.runs")

    def recorded(self, found: Any) -> Iterable[Run]:
        """The runs that get a dataset card."""
        return list(found.values())

    def skipping_bad(self, config: Any) -> Any:
        """The configuration, passing over records of its workload that cannot be used."""
        from sglang_probe.harvest.config import with_skip_bad

        return with_skip_bad(config, skip_bad=True)

    def parameters(self) -> list[Parameter]:
        """The flags of every study that records."""
        flags = {
            "overwrite": "Delete what was recorded, and record everything again.",
            "resume": "Keep complete runs, finish the interrupted one, and record the rest.",
            "report_only": "Study the runs that exist; start no engine.",
            "plan": "Print what would be recorded and how often SGLang would be started, and stop.",
            "skip_bad": "Skip records of the workload that cannot be used, and count them by reason.",
        }
        return [
            EXPERIMENT,
            output_option("Folder of the study; default: `<output>/<name>` of the YAML."),
            *(option(name, bool, False, help) for name, help in flags.items()),
            option("example", bool, False, example_option(self.example)),
            option("schema", bool, False, schema_option(self.config)),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[Result, Path] | Plan:
        """Record or read the runs, and study them."""
        from sglang_probe.harvest.directory import hold_directory
        from sglang_probe.harvest.progress import Terminal

        config, name, folder = opened(given, self.config())
        if given["skip_bad"]:
            config = self.skipping_bad(config)
        if given["report_only"]:
            found = self.runs().read(config, folder)
        else:
            terminal = Terminal(console)
            with terminal.stage("checking model and workload"):
                prepared = self.runs().prepare(config)
            plan = self.plan(prepared, config)
            show(console, [plan.table, *plan.notes, f"engine starts: {plan.starts}"])
            for ours in prepared.values() if isinstance(prepared, Mapping) else [prepared]:
                if skipped := getattr(getattr(ours, "workload", None), "skipped_in_words", ""):
                    console.print(skipped, style="yellow", markup=False, highlight=False, soft_wrap=True)
            if given["plan"]:
                return plan
            how = {k: given[k] for k in ("overwrite", "resume")}
            with hold_directory(folder):
                found = self.runs().run(prepared, config, folder, **how, reporter=terminal)
                # Runs that were there, and lie elsewhere, keep the card they have.
                write_cards(r for r in self.recorded(found) if folder.resolve() in r.path.resolve().parents)
        with console.status("studying") as status:
            return self.study(found, config, folder, name, status.update), folder


EXPERIMENT = Parameter(
    "experiment",
    Parameter.KEYWORD_ONLY,
    annotation=Annotated[Path, typer.Argument(help="YAML of the study; `--example` prints one.")],
)
_JSON = Parameter(
    "as_json",
    Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool, typer.Option("--json", help="Print only the summary, as JSON; everything else goes to standard error.")
    ],
)


def option(name: str, kind: Any, default: Any, help: Any) -> Parameter:
    """An option of a command; `help` is a text, or what Typer makes of one."""
    info = typer.Option(help=help) if isinstance(help, str) else help
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def output_option(help: str) -> Parameter:
    """`--output`."""
    return option("output", Path | None, None, help)


def example_option(text: str) -> Any:
    """`--example`: print a YAML to start from, and stop."""

    def show_example(value: bool) -> None:
        if value:
            typer.echo(text.strip())
            raise typer.Exit()

    return typer.Option("--example", help="Print a YAML to start from.", callback=show_example, is_eager=True)


def schema_option(config: Callable[[], type[Config]]) -> Any:
    """`--schema`: print everything that the YAML may hold as a JSON schema, and stop."""

    def show_schema(value: bool) -> None:
        if value:
            typer.echo(json.dumps(config().model_json_schema(), indent=1))
            raise typer.Exit()

    text = "Print every key that the YAML may have, as a JSON schema."
    return typer.Option("--schema", help=text, callback=show_schema, is_eager=True)


def opened(given: Mapping[str, Any], config: type[Config]) -> tuple[Any, str, Path]:
    """The configuration that `experiment` names, the name of the study, and its folder."""
    from sglang_probe.config import load_config

    read: Any = load_config(given["experiment"], config)
    name = read.name or given["experiment"].stem
    return read, name, given["output"] or read.output / name


def show(console: Console, what: Iterable[Table | str]) -> None:
    """Print tables and lines of text; the lines may hold markup."""
    from sglang_probe.report.terminal import print_table

    for shown in what:
        if isinstance(shown, str):
            console.print(shown, highlight=False, soft_wrap=True)
        else:
            print_table(console, shown)


@contextmanager
def bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; what is yielded is told how many of how many were done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def write_tables(tables: Mapping[str, pd.DataFrame], folder: Path) -> None:
    """Each table as Parquet, and as CSV where it is short enough to be opened as one."""
    folder.mkdir(exist_ok=True)
    for name, frame in tables.items():
        frame.to_parquet(folder / f"{name}.parquet", compression="zstd")
        if len(frame) <= MOST_CSV_ROWS:
            frame.to_csv(folder / f"{name}.csv", index=False)


def write_cards(runs: Iterable[Run]) -> None:
    """The dataset card of each run."""
    from sglang_probe.studies.coverage.card import write_card

    for run in runs:
        write_card(run)


def records(frame: pd.DataFrame, digits: int = 10) -> list[dict[str, Any]]:
    """Rows as plain data, with numbers rounded to so many digits after the point."""
    rows: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=digits))
    return rows


def plain(value: Any) -> Any:
    """The value as JSON has it: numbers of NumPy become Python's, missing and infinite ones null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else _missing_or_text(value)


def _missing_or_text(value: Any) -> str | None:
    import pandas as pd

    return None if value is pd.NA or value is pd.NaT else str(value)


@contextmanager
def _diverted_output() -> Iterator[None]:
    """Meanwhile what is written to standard output, also by engine processes, goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
