"""`sglang-probe sae overlap`."""

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
    from sglang_probe.studies.sae_overlap.study import OverlapResult


class SaeOverlap(Study):
    """Do two regimes of rows use the same features, and do these mean the same? Every number beside its nulls.

    The runs are recordings of the same requests: arms of an experiment, or the decoded text and the same text prefilled
    again. Rows are paired by request and position; those that either run lacks, sinks, and rows under interventions
    take no part. Rows of the same tokens say what numerics do (Jaccard of the active sets). Rates, sets of common
    features and effective directions stand beside the same statistics with the two regimes exchanged within texts and
    between halves of one regime. Texts are families of requests, at least six.

    Example: `sglang-probe sae overlap models/sae-probe-text/seed-0 runs/phase/human runs/phase/decoded
    --where-second "phase == 'decode'"`
    """

    name = "sae overlap"

    def parameters(self) -> list[Parameter]:
        """The SAE, the two runs, which rows, and other dictionaries."""
        folder = typer.Argument(help="Folder of an SAE, whose dictionary both regimes are read with.")
        runs = [typer.Argument(help=f"Run directory of the {which} regime.") for which in ("first", "second")]
        where = "Which positions of the {} run: a pandas query over `run.tokens()`. A position takes part if both fit."
        return [
            Parameter("sae", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, folder]),
            Parameter("run_a", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, runs[0]]),
            Parameter("run_b", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, runs[1]]),
            option("where_first", str | None, None, where.format("first")),
            option("where_second", str | None, None, where.format("second")),
            option("other", Path | None, None, "A dictionary of the second regime: which latents are split or merged?"),
            option("floor", list[Path], [], "Dictionaries of the first regime with other seeds; `--other` needs one."),
            option("first_positions", int, 1, "Positions at the start of requests that are left out as sinks."),
            option("norm_multiple", float, 10.0, "Leave out rows of more than so many times the median norm; 0: none."),
            option("most", int, 40_000, "Positions to compare, drawn at random."),
            option("draws", int, 999, "Random exchanges of the regimes."),
            output_option("Folder of the results; default: `sae-overlap` in the second run directory."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[OverlapResult, Path]:
        """Compare them."""
        from sglang_probe.errors import ConfigError
        from sglang_probe.sae.evaluation import Sinks
        from sglang_probe.studies.sae_overlap.study import study_overlap

        if given["first_positions"] < 0 or given["norm_multiple"] < 0 or given["most"] < 1 or given["draws"] < 19:
            raise ConfigError(
                "`--first-positions` and `--norm-multiple` are at least 0, `--most` at least 1, `--draws` at least 19"
            )
        with console.status("reading") as status:
            result = study_overlap(
                given["sae"],
                (given["run_a"], given["run_b"]),
                where=(given["where_first"], given["where_second"]),
                sinks=Sinks(given["first_positions"], given["norm_multiple"] or None),
                most=given["most"],
                other=given["other"],
                floors=given["floor"],
                draws=given["draws"],
                tell=status.update,
            )
        return result, given["output"] or given["run_b"] / "sae-overlap"

    def page(self, result: OverlapResult) -> Page:
        """The report."""
        from sglang_probe.studies.sae_overlap.page import overlap_page

        return overlap_page(result)

    def shown(self, result: OverlapResult) -> Iterator[Table | str]:
        """The answer, and the tables with their nulls."""
        from rich.markup import escape

        from sglang_probe.studies.sae_overlap.page import answer, numerics_table, sets_table, splits_table, turn_table

        yield escape(answer(result).replace("`", ""))
        yield numerics_table(result)
        yield sets_table(result)
        yield turn_table(result)
        if len(result.splits):
            yield splits_table(result)
        yield from (f"[yellow]note[/]: {escape(note)}" for note in result.notes)
