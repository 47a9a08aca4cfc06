"""`sglang-probe debug`."""

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
    from sglang_probe.studies.debug.study import DebugResult


class Debug(Study):
    """Why a wrong answer and not the right one? Features that support either, and the test by ablation over prompts.

    The metric is the logit of the wrong answer minus that of the right one where it was given. Features are sorted into
    those that support the wrong answer alone, the right one alone, and both; those that support the wrong one over the
    right one most are then ablated in prompts that they were not found in, beside random features that are as active.

    Example: `sglang-probe debug runs/mine --sae saes/block10 --wrong '))' --right ')))'`
    """

    name = "debug"

    def parameters(self) -> list[Parameter]:
        """The run, the SAEs, and the cases."""
        run = typer.Argument(help="Run directory with the answers and their token ids.")
        sae = typer.Option(help="Folder of an SAE of `blocks.N.hook_resid_post`; once for each layer.")
        cases = (
            'File of cases instead, a JSON object a line: {"rid": ..., "right": token} (and "wrong", "step"), or two '
            'recorded continuations of one prompt, {"wrong_rid": ..., "right_rid": ...}.'
        )
        return [
            Parameter("run", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, run]),
            Parameter("sae", Parameter.KEYWORD_ONLY, annotation=Annotated[list[Path], sae]),
            option("right", str | None, None, "The right answer: text of one token, or `#ID`."),
            option("wrong", str | None, None, "Cases are requests that answered this; default: anything else."),
            option("step", int, 1, "Which output token is the answer, from 1."),
            option("cases", Path | None, None, cases),
            option("top", int, 20, "Features in the set of either answer."),
            option("shortlist", int, 6, "Features that are ablated."),
            option("random", int, 4, "Random features beside each of them."),
            option("rows", Path | None, None, "Run whose rows give features their names; default: the run itself."),
            option("most", int, 20_000, "Rows to read for that, whole requests drawn at random."),
            option("first_positions", int, 1, "Positions at the start of a prompt that have no features."),
            option("norm_multiple", float, 10.0, "Nor have rows of more than so many times the median norm; 0: all."),
            option("model", Path | None, None, "Folder of the checkpoint; default: the one that the run names."),
            option("seed", int, 0, "Of all draws."),
            output_option("Folder of the results; default: `debug` in the run directory."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[DebugResult, Path]:
        """Debug."""
        from sglang_probe.errors import ConfigError
        from sglang_probe.sae.evaluation import Sinks
        from sglang_probe.studies.debug.study import debug

        if given["first_positions"] < 0 or given["norm_multiple"] < 0 or given["most"] < 1:
            raise ConfigError("`--first-positions` and `--norm-multiple` are at least 0, and `--most` at least 1")
        if min(given[n] for n in ("top", "shortlist", "random", "step")) < 1:
            raise ConfigError("`--top`, `--shortlist`, `--random` and `--step` are at least 1")
        sinks = Sinks(given["first_positions"], given["norm_multiple"] or None)
        names = ("right", "wrong", "step", "cases", "top", "shortlist", "random", "rows", "most", "model", "seed")
        with bar(console, "cases") as tell:
            result = debug(given["run"], given["sae"], **{n: given[n] for n in names}, sinks=sinks, tell=tell)
        return result, given["output"] or given["run"] / "debug"

    def page(self, result: DebugResult) -> Page:
        """The report."""
        from sglang_probe.studies.debug.page import debug_page

        return debug_page(result)

    def shown(self, result: DebugResult) -> Iterator[Table | str]:
        """The test."""
        from rich.markup import escape

        from sglang_probe.studies.debug.page import answer, test_table

        yield escape(answer(result).replace("`", ""))
        if len(result.tests):
            yield test_table(result)
        yield from (f"[yellow]note[/]: {escape(note)}" for note in result.notes)
