"""`sglang-probe sae eval`."""

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
    from sglang_probe.studies.sae_eval.study import EvalResult


class SaeEval(Study):
    """How well does a sparse autoencoder reconstruct the rows of recorded runs, and which rows not?

    Explained variance, active latents and dead latents, in all and by segment, phase, band of positions and run.
    Attention sinks are left out, by position and by norm, and counted. An SAE whose folder says that it is of other
    weights than the runs is refused. Needs neither SGLang nor SAELens.

    `--against saelens` has SAELens judge the same weights, by its own code (the extra `[sae]`): on the same rows, as it
    does by itself (every position, through a model of its own), and, with `--gap`, what replacing rows does to the
    cross-entropy. Ours, theirs and the difference stand side by side, with the reason of each.

    Example: `sglang-probe sae eval models/sae-probe-text/seed-0 runs/mine`
    """

    name = "sae eval"

    def parameters(self) -> list[Parameter]:
        """The SAE, the runs, and which rows."""
        folder = typer.Argument(help="Folder of an SAE: of `sglang-probe sae train`, SAELens, or Gemma Scope.")
        runs = typer.Argument(help="Run directories with rows of its hook point.")
        return [
            Parameter("sae", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, folder]),
            Parameter("runs", Parameter.KEYWORD_ONLY, annotation=Annotated[list[Path], runs]),
            option("hook_point", str | None, None, "Where its rows come from, for folders that do not say."),
            option("where", str | None, None, "Which positions: a pandas query over the columns of `run.tokens()`."),
            option("first_positions", int, 1, "Positions at the start of requests that are left out as sinks."),
            option("norm_multiple", float, 10.0, "Leave out rows of more than so many times the median norm; 0: none."),
            option("most", int, 40_000, "Rows to judge by, drawn at random."),
            option("against", str | None, None, "`saelens`: have SAELens judge the same weights too."),
            option("gap", Path | None, None, "Results of `sglang-probe sae gap` of this SAE, for `--against saelens`."),
            option("model", Path | None, None, "Folder of the model; default: where it was when the run was recorded."),
            option("texts", int, 16, "Texts that run through SAELens' model, for `--against saelens`."),
            output_option("Folder of the results; default: `sae-eval` in the first run directory."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[EvalResult, Path]:
        """Judge it."""
        from sglang_probe.errors import ConfigError
        from sglang_probe.sae.evaluation import Sinks
        from sglang_probe.studies.sae_eval.study import judge

        if given["first_positions"] < 0 or given["norm_multiple"] < 0 or given["most"] < 1:
            raise ConfigError("`--first-positions` and `--norm-multiple` are at least 0, and `--most` at least 1")
        if given["against"] not in (None, "saelens") or given["texts"] < 1:
            raise ConfigError("`--against` is `saelens`, and `--texts` at least 1")
        if given["gap"] is not None and given["against"] is None:
            raise ConfigError("`--gap` has no meaning without `--against saelens`")
        sinks = Sinks(given["first_positions"], given["norm_multiple"] or None)
        how = {k: given[k] for k in ("hook_point", "where", "most", "gap", "model", "texts")}
        with console.status("judging") as shown:
            how |= {"against_saelens": given["against"] is not None, "tell": shown.update}
            result = judge(given["sae"], given["runs"], sinks=sinks, **how)
        return result, given["output"] or given["runs"][0] / "sae-eval"

    def page(self, result: EvalResult) -> Page:
        """The report."""
        from sglang_probe.studies.sae_eval.page import eval_page

        return eval_page(result)

    def shown(self, result: EvalResult) -> Iterator[Table | str]:
        """The numbers, by group."""
        from rich.markup import escape

        from sglang_probe.studies.sae_eval.page import against_table, answer, group_table

        yield escape(answer(result).replace("`", ""))
        yield group_table(result)
        if result.against is not None:
            yield against_table(result.against)
        yield from (f"[yellow]note[/]: {escape(note)}" for note in result.notes)
