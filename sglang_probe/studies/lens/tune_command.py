"""`sglang-probe tune-lens`."""

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
    from sglang_probe.studies.lens.tune import TuneResult


class TuneLens(Study):
    """How much nearer to the model's prediction is a lens that was trained? An affine map a layer, on recorded rows.

    Its KL on held-out texts stands beside that of the plain lens. Needs rows after the model's last layer and after
    others. The folder that this writes is what `sglang-probe lens --tuned` reads. After a layer where no map does
    better than the plain lens, the plain one is kept.

    Example: `sglang-probe tune-lens runs/mine --output lenses/mine`, then `sglang-probe lens runs/other --tuned
    lenses/mine`
    """

    name = "tune-lens"

    def parameters(self) -> list[Parameter]:
        """The run, and how long."""
        run = typer.Argument(help="Run directory with rows of `hook_resid_post` after several layers and the last.")
        return [
            Parameter("run", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, run]),
            option("where", str | None, None, "Which positions: a pandas query over the columns of `run.tokens()`."),
            option("first_positions", int, 1, "Positions at the start of requests that are left out as sinks."),
            option("norm_multiple", float, 10.0, "Leave out rows of more than so many times the median norm; 0: none."),
            option("most", int, 6000, "Positions to read, drawn at random."),
            option("steps", int, 100, "Steps of the descent in each layer; each costs 64 rows of logits."),
            option("model", Path | None, None, "Folder of the checkpoint; default: the one that the run names."),
            option("seed", int, 0, "Of all draws."),
            output_option("Folder of the lens; default: `tuned-lens` in the run directory."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[TuneResult, Path]:
        """Train."""
        from sglang_probe.errors import ConfigError
        from sglang_probe.sae.evaluation import Sinks
        from sglang_probe.studies.lens.tune import tune

        if given["first_positions"] < 0 or given["norm_multiple"] < 0 or given["most"] < 1 or given["steps"] < 0:
            raise ConfigError(
                "`--first-positions`, `--norm-multiple` and `--steps` are at least 0, and `--most` at least 1"
            )
        sinks = Sinks(given["first_positions"], given["norm_multiple"] or None)
        how = {n: given[n] for n in ("where", "most", "steps", "model", "seed")}
        with bar(console, "layers") as tell:
            result = tune(given["run"], sinks=sinks, **how, tell=tell)
        folder = given["output"] or given["run"] / "tuned-lens"
        result.lens.write(folder)
        return result, folder

    def page(self, result: TuneResult) -> Page:
        """The report."""
        from sglang_probe.studies.lens.tune_page import tune_page

        return tune_page(result)

    def shown(self, result: TuneResult) -> Iterator[Table | str]:
        """KL by layer."""
        from rich.markup import escape

        from sglang_probe.studies.lens.tune_page import answer, layer_table

        yield escape(answer(result).replace("`", ""))
        yield layer_table(result)
        yield from (f"[yellow]note[/]: {escape(note)}" for note in result.notes)
