"""`sglang-probe diff`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_probe.studies.base import Parameter, Study, bar, option, output_option

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.report.page import Page
    from sglang_probe.report.tables import Table
    from sglang_probe.studies.diff.study import DiffResult


class Diff(Study):
    """Which features of a sparse autoencoder differ between two groups of texts? Ends in a shortlist.

    Groups are named by segment, family, run, or an axis that the workload labelled. Rates are compared by a permutation
    over texts, not tokens, with the false discovery rate held over features; found on half of the texts, confirmed on
    the other half, and asked again within matched tokens: is it only the words? The same pipeline runs on groups that
    were exchanged at random and on random halves of one group, and its discoveries stand beside the real ones.

    Example: `sglang-probe diff models/sae-probe-text/seed-0 runs/mine --by family --a 'code/*' --b 'prose/*'`
    """

    name = "diff"

    def parameters(self) -> list[Parameter]:
        """The SAE, the runs, and the groups."""
        sae = typer.Argument(help="Folder of an SAE: of `sglang-probe sae train`, SAELens, or Gemma Scope.")
        run = typer.Argument(help="Run directories with rows of the SAE's hook point, and token ids.")
        by = typer.Option(help="What names groups: `segment`, `family`, `run`, or an axis that the workload labelled.")
        a = typer.Option("--a", help="Names of group A; a pattern as of files, e.g. `code/*`.")
        b = typer.Option("--b", help="Names of group B.")
        return [
            Parameter("sae", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, sae]),
            Parameter("run", Parameter.KEYWORD_ONLY, annotation=Annotated[list[Path], run]),
            Parameter("by", Parameter.KEYWORD_ONLY, annotation=Annotated[str, by]),
            Parameter("a", Parameter.KEYWORD_ONLY, annotation=Annotated[str, a]),
            Parameter("b", Parameter.KEYWORD_ONLY, annotation=Annotated[str, b]),
            option("q", float, 0.05, "False discovery rate."),
            option("permutations", int, 20_000, "Of the groups; no p is below one over it."),
            option("splits", int, 20, "Of each group into random halves, in which nothing differs; 0: none."),
            option("hook_point", str | None, None, "Where its rows come from, for folders that do not say."),
            option("where", str | None, None, "Which positions: a pandas query over the columns of `run.tokens()`."),
            option("first_positions", int, 1, "Positions at the start of requests that are left out as sinks."),
            option("norm_multiple", float, 10.0, "Leave out rows of more than so many times the median norm; 0: none."),
            option("most", int, 200_000, "Rows to read, whole requests drawn at random from all runs."),
            option("model", Path | None, None, "Folder of the tokenizer; default: the one that the run names."),
            option("seed", int, 0, "Of all draws."),
            output_option("Folder of the results; default: `diff` in the run directory."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[DiffResult, Path]:
        """Compare."""
        from sglang_probe.errors import ConfigError
        from sglang_probe.sae.evaluation import Sinks
        from sglang_probe.studies.diff.study import diff

        if given["first_positions"] < 0 or given["norm_multiple"] < 0 or given["most"] < 1:
            raise ConfigError("`--first-positions` and `--norm-multiple` are at least 0, and `--most` at least 1")
        if not 0 < given["q"] < 1 or given["permutations"] < 100:
            raise ConfigError("`--q` lies between 0 and 1, and `--permutations` is at least 100")
        if given["splits"] < 0:
            raise ConfigError("`--splits` is at least 0")
        if given["output"] is None and len(given["run"]) > 1:
            raise ConfigError("several runs have no folder in common for the results", fix="give --output")
        sinks = Sinks(given["first_positions"], given["norm_multiple"] or None)
        how = {
            n: given[n]
            for n in ("by", "a", "b", "q", "permutations", "splits", "hook_point", "where", "most", "model", "seed")
        }
        with bar(console, "rows") as tell:
            result = diff(given["sae"], given["run"], sinks=sinks, **how, tell=tell)
        return result, given["output"] or given["run"][0] / "diff"

    def page(self, result: DiffResult) -> Page:
        """The report."""
        from sglang_probe.studies.diff.page import diff_page

        return diff_page(result)

    def shown(self, result: DiffResult) -> Iterator[Table | str]:
        """The shortlist."""
        from rich.markup import escape

        from sglang_probe.studies.diff.page import answer, shortlist_table

        yield escape(answer(result).replace("`", ""))
        if len(result.shortlist):
            yield shortlist_table(result)
        yield from (f"[yellow]note[/]: {escape(note)}" for note in result.notes)
