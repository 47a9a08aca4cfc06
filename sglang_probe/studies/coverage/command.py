"""`sglang-probe coverage`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_probe.studies.base import Parameter, Study, option, output_option

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.report.page import Page
    from sglang_probe.report.tables import Table
    from sglang_probe.studies.coverage.output import CoverageResult


class CoverageStudy(Study):
    """Which classes of tokens does a harvest hold, and which did the prefix cache keep from it?

    For each class: occurrences in traffic, how many of them were computed, its share of the harvest against its share
    of the traffic with an interval, and how many occurrences one computed position stands for. Several runs are set
    side by side. Needs no SGLang.

    Beside the report: `coverage.md`, a paragraph and a table to paste into a methods section, and a file of correction
    weights for each axis, which `run.iter_batches(weight=PATH)` takes.

    Example: `sglang-probe coverage runs/mine --axis segment --axis lexical --by position`
    """

    name = "coverage"

    def parameters(self) -> list[Parameter]:
        """The runs, and the axes of token classes."""
        runs = typer.Argument(help="Run directories, or closed segments of a live recording.")
        axis = (
            "Axis of token classes; may be given several times. `segment` (default), `role`, `lexical`, `frequency`, "
            "`repeat`, `position`, `phase`, `depth`, an axis that the workload labelled, `NAME=~REGEX`, or "
            "`module:function`."
        )
        return [
            Parameter("runs", Parameter.KEYWORD_ONLY, annotation=Annotated[list[Path], runs]),
            option("axis", list[str] | None, None, axis),
            option("by", str | None, "position", "Cross every axis with this one. `none`: with nothing."),
            option("model", Path | None, None, "Folder with the tokenizer; default: where the run's was."),
            output_option("Folder of the results; default: `coverage` in the run directory."),
            option("seed", int, 0, "Seed of how many families are put into few groups."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[CoverageResult, Path]:
        """Measure the runs; writes weights and `coverage.md`."""
        from sglang_probe.errors import ConfigError
        from sglang_probe.run.run import load_run
        from sglang_probe.studies.coverage.output import CoverageResult, write_files
        from sglang_probe.studies.coverage.result import name_apart
        from sglang_probe.studies.coverage.study import Study as Passes
        from sglang_probe.studies.coverage.weights import write_weights

        runs: list[Path] = given["runs"]
        opened = [load_run(path) for path in runs]
        if given["output"] is None and len(runs) > 1:
            raise ConfigError("several runs have no folder in common", fix="give --output")
        folder = given["output"] or runs[0] / "coverage"
        crossed = None if given["by"] in (None, "none") else given["by"]
        found, weights = [], {}
        with console.status("counting"):
            for run in opened:
                study = Passes(run, given["axis"] or ["segment"], by=crossed, model=given["model"])
                study.require_axes()
                found.append((study, study.measure(seed=given["seed"])))
            studies = name_apart([c for _, c in found])
            for (study, _), c in zip(found, studies, strict=True):
                place = folder if len(studies) == 1 else folder / c.run
                place.mkdir(parents=True, exist_ok=True)
                weights[c.run] = write_weights(study, c.maps, place)
        write_files(studies, folder)
        return CoverageResult(studies, weights), folder

    def page(self, result: CoverageResult) -> Page:
        """The report."""
        from sglang_probe.studies.coverage.page import coverage_page

        return coverage_page(result.studies)

    def shown(self, result: CoverageResult) -> Iterator[Table | str]:
        """Coverage by class, the paragraph, and what was left out."""
        from rich.markup import escape

        from sglang_probe.studies.coverage.page import class_table
        from sglang_probe.studies.coverage.words import paragraph

        for c in result.studies:
            yield from (class_table(c, m) for m in c.maps if len(m.axes) == 1)
            yield escape(paragraph(c))
            yield from (f"note: {escape(note)}" for note in c.notes)
            yield from (f"[yellow]axis {escape(a)} was left out[/]: {escape(why)}" for a, why in c.missing_axes.items())
            yield from (f"weights: {escape(str(path))}" for path in result.weights[c.run].values())
