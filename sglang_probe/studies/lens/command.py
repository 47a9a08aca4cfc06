"""`sglang-probe lens`."""

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
    from sglang_probe.studies.lens.study import LensResult


class Lens(Study):
    """What would the model say after each layer? The logit lens on recorded rows, without an engine.

    Final norm and unembedding of the checkpoint, on rows of `blocks.N.hook_resid_post`: the most likely token in every
    cell of layer and position, entropy, KL to the final distribution, the rank of a target, by layer, by phase and
    over positions. Beside each rank stands that of another position's target: what frequent tokens get for nothing.

    Example: `sglang-probe lens runs/mine --rid r000003 --start 100 --window 32`
    """

    name = "lens"

    def parameters(self) -> list[Parameter]:
        """The run, and which positions."""
        run = typer.Argument(help="Run directory with rows of `hook_resid_post` after several layers.")
        return [
            Parameter("run", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, run]),
            option("target", str | None, None, "Token whose rank is told: its text, or `#ID`; default: the next one."),
            option("where", str | None, None, "Which positions: a pandas query over the columns of `run.tokens()`."),
            option("rid", str | None, None, "Request of the map; default: the first."),
            option("start", int | None, None, "First position of the map; default: around the end of the prompt."),
            option("window", int, 24, "Positions of the map."),
            option("most", int, 1000, "Positions to measure by, drawn at random."),
            option("tuned", Path | None, None, "Folder of a tuned lens (`sglang-probe tune-lens`), to read through."),
            option("model", Path | None, None, "Folder of the checkpoint; default: the one that the run names."),
            option("seed", int, 0, "Of the draw."),
            output_option("Folder of the results; default: `lens` in the run directory."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[LensResult, Path]:
        """Read the layers."""
        from sglang_probe.errors import ConfigError
        from sglang_probe.studies.lens.study import lens

        if given["window"] < 1 or given["most"] < 1 or (given["start"] or 0) < 0:
            raise ConfigError("`--window` and `--most` are at least 1, and `--start` at least 0")
        how = {n: given[n] for n in ("target", "where", "rid", "start", "window", "most", "tuned", "model", "seed")}
        with bar(console, "positions") as tell:
            result = lens(given["run"], **how, tell=tell)
        return result, given["output"] or given["run"] / "lens"

    def page(self, result: LensResult) -> Page:
        """The report."""
        from sglang_probe.studies.lens.page import lens_page

        return lens_page(result)

    def shown(self, result: LensResult) -> Iterator[Table | str]:
        """The numbers, by layer."""
        from rich.markup import escape

        from sglang_probe.studies.lens.page import answer, layer_table

        yield escape(answer(result).replace("`", ""))
        yield layer_table(result)
        yield from (f"[yellow]note[/]: {escape(note)}" for note in result.notes)
