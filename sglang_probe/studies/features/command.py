"""`sglang-probe features`."""

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
    from sglang_probe.studies.features.study import FeaturesResult


class Features(Study):
    """What are the features of a sparse autoencoder about? A dashboard, and what its labels are worth.

    `dashboard.html` is one file with a card for every latent that fires: top examples and some of each quarter of its
    activations, with request and position; rates by kind of token, phase, segment and position; the tokens that its
    direction raises; nearest latents by decoder and by firing. Labels are heuristic (the tokens on which it fires) and
    are scored on texts that they were not found on, beside labels of other latents and of random directions.

    Example: `sglang-probe features runs/mine --sae models/sae-probe-text/seed-0`
    """

    name = "features"

    def parameters(self) -> list[Parameter]:
        """The run, the SAE, and which rows."""
        run = typer.Argument(help="Run directory with rows of the SAE's hook point, and token ids.")
        sae = typer.Option(help="Folder of an SAE: of `sglang-probe sae train`, SAELens, or Gemma Scope.")
        return [
            Parameter("run", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, run]),
            Parameter("sae", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, sae]),
            option("hook_point", str | None, None, "Where its rows come from, for folders that do not say."),
            option("where", str | None, None, "Which positions: a pandas query over the columns of `run.tokens()`."),
            option("first_positions", int, 1, "Positions at the start of requests that are left out as sinks."),
            option("norm_multiple", float, 10.0, "Leave out rows of more than so many times the median norm; 0: none."),
            option("most", int, 200_000, "Rows to read, whole requests drawn at random."),
            option("model", Path | None, None, "Folder of the checkpoint; default: the one that the run names."),
            option("seed", int, 0, "Of all draws."),
            output_option("Folder of the results; default: `features` in the run directory."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[FeaturesResult, Path]:
        """Look at every latent."""
        from sglang_probe.errors import ConfigError
        from sglang_probe.sae.evaluation import Sinks
        from sglang_probe.studies.features.dashboard import write_dashboard
        from sglang_probe.studies.features.study import study

        if given["first_positions"] < 0 or given["norm_multiple"] < 0 or given["most"] < 1:
            raise ConfigError("`--first-positions` and `--norm-multiple` are at least 0, and `--most` at least 1")
        sinks = Sinks(given["first_positions"], given["norm_multiple"] or None)
        how = {n: given[n] for n in ("hook_point", "where", "most", "model", "seed")}
        with bar(console, "rows") as tell:
            result = study(given["run"], given["sae"], sinks=sinks, **how, tell=tell)
        folder = given["output"] or given["run"] / "features"
        folder.mkdir(parents=True, exist_ok=True)
        with console.status("writing the dashboard"):
            told = write_dashboard(result, folder)
        result.notes[len(result.notes) :] = told  # type: ignore[index]
        return result, folder

    def page(self, result: FeaturesResult) -> Page:
        """The report."""
        from sglang_probe.studies.features.page import features_page

        return features_page(result)

    def shown(self, result: FeaturesResult) -> Iterator[Table | str]:
        """Scores beside their nulls."""
        from rich.markup import escape

        from sglang_probe.studies.features.dashboard import DASHBOARD
        from sglang_probe.studies.features.page import answer, score_table

        yield escape(answer(result))
        yield score_table(result)
        yield from (f"[yellow]note[/]: {escape(note)}" for note in result.notes)
        yield f"{DASHBOARD}, beside the report, has a card for every latent"
