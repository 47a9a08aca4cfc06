"""`sglang-probe monitor`."""

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
    from sglang_probe.studies.monitor.study import MonitorResult


class Monitor(Study):
    """Which requests of recorded runs were unusual, and has the stream of them drifted?

    The reference says what is usual. Without `--hook-point` the recorded scores of probes are watched (`scores` of a
    recording), with it the rows of that hook point, with `--sae` also an SAE's error, its active latents, and the
    latents that `--feature` names. Runs are segments of one stream, in the order given. Needs no SGLang.

    False alarms have stated rates, if reference and runs are traffic of one kind: a share `--share` of the requests,
    and for the stream a chance of at most `--rate` times the number of requests.

    Example: `sglang-probe monitor runs/monday runs/tuesday --reference runs/last-week`
    """

    name = "monitor"

    def parameters(self) -> list[Parameter]:
        """The runs, what is watched, and how often it may alarm falsely."""
        runs = typer.Argument(help="Run directories to monitor: segments of one stream, in this order.")
        reference = typer.Option(help="Run directory that says what is usual; may be repeated.")
        features = typer.Option("--feature", help="A latent of the SAE to watch; may be repeated.")
        return [
            Parameter("runs", Parameter.KEYWORD_ONLY, annotation=Annotated[list[Path], runs]),
            Parameter("reference", Parameter.KEYWORD_ONLY, annotation=Annotated[list[Path], reference]),
            option("hook_point", str | None, None, "Watch rows of this hook point, not recorded scores."),
            option("sae", Path | None, None, "Folder of an SAE of that hook point."),
            Parameter(
                "features", Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[int] | None, features]
            ),
            option(
                "where",
                str,
                "phase == 'decode'",
                "Which positions: a pandas query over the columns of `run.tokens()`.",
            ),
            option("rows", int | None, None, "Compare the first so many rows of each request; leave out shorter ones."),
            option("share", float, 0.01, "Share of requests that may alarm falsely, over all statistics."),
            option("rate", float, 0.001, "False alarms of the stream, per request, over all statistics."),
            option("segment", int | None, None, "Requests of a line of the drift log; default: a line a run."),
            option("adwin", bool, False, "Run ADWIN beside it, for comparison (needs the package `river`)."),
            output_option("Folder of the results; default: `monitor` in the first run directory."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[MonitorResult, Path]:
        """Judge the runs."""
        from sglang_probe.errors import ConfigError
        from sglang_probe.studies.monitor.study import Options, monitor

        for name in ("share", "rate"):
            if not 0 < given[name] < 1:
                raise ConfigError(f"`--{name}` lies between 0 and 1 (got {given[name]:g})")
        for name in ("rows", "segment"):
            if given[name] is not None and given[name] < 1:
                raise ConfigError(f"`--{name}` is at least 1 (got {given[name]})")
        names = ("hook_point", "sae", "where", "rows", "share", "rate", "segment", "adwin")
        options = Options(features=tuple(given["features"] or ()), **{n: given[n] for n in names})
        with console.status("comparing with the reference"):
            result = monitor(given["runs"], given["reference"], options)
        return result, given["output"] or given["runs"][0] / "monitor"

    def page(self, result: MonitorResult) -> Page:
        """The report."""
        from sglang_probe.studies.monitor.page import monitor_page

        return monitor_page(result)

    def shown(self, result: MonitorResult) -> Iterator[Table | str]:
        """What was found, and the drift log."""
        from rich.markup import escape

        from sglang_probe.studies.monitor.page import answer, segments_table

        yield escape(answer(result))
        yield segments_table(result)
        yield from (f"[yellow]note[/]: {escape(note)}" for note in result.notes)
