"""`sglang-probe coverage`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or closed segments of a live recording.")],
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="Axis of token classes; may be given several times. `segment` (default), `role`, `lexical`, "
            "`frequency`, `repeat`, `position`, `phase`, `depth`, an axis that the workload labelled, `NAME=~REGEX`, "
            "or `module:function`."
        ),
    ] = None,
    by: Annotated[str | None, typer.Option(help="Cross every axis with this one. `none`: with nothing.")] = "position",
    model: Annotated[Path | None, typer.Option(help="Folder with the tokenizer; default: where the run's was.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for report and weights; default: `coverage` in the run directory.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result on standard output.")] = False,
) -> None:
    """Which classes of tokens a harvest computed, and which the prefix cache kept from it.

    Writes `coverage.html`, `coverage.json`, `coverage.md` (a paragraph and a table to paste), and a file of correction
    weights for each map, which `run.iter_batches(weight=PATH)` takes. Needs no SGLang; several runs are set side by
    side.
    """
    import json

    from rich.console import Console

    from sglang_probe.errors import ConfigError
    from sglang_probe.report.page import write
    from sglang_probe.run.run import load_run
    from sglang_probe.studies.coverage.output import to_json, write_files
    from sglang_probe.studies.coverage.page import coverage_page
    from sglang_probe.studies.coverage.result import name_apart
    from sglang_probe.studies.coverage.study import Study
    from sglang_probe.studies.coverage.weights import write_weights
    from sglang_probe.studies.coverage.words import paragraph, ratio_in_words

    opened = [load_run(path) for path in runs]
    if output is None and len(runs) > 1:
        raise ConfigError("several runs have no folder in common", fix="give --output")
    folder = output or runs[0] / "coverage"
    axes = axis or ["segment"]
    crossed = None if by in (None, "none") else by
    found, weights = [], {}
    for run in opened:
        study = Study(run, axes, by=crossed, model=model)
        study.require_axes()
        found.append((study, study.measure(seed=seed)))
    studies = name_apart([c for _, c in found])
    for (study, _), c in zip(found, studies, strict=True):
        place = folder if len(studies) == 1 else folder / c.run
        place.mkdir(parents=True, exist_ok=True)
        weights[c.run] = write_weights(study, c.maps, place)
    write_files(studies, weights, folder)
    write(coverage_page(studies), folder / "coverage.html")
    if as_json:
        typer.echo(json.dumps(to_json(studies, weights), indent=2, allow_nan=False))
        return

    from sglang_probe.cli.output import print_frame

    console = Console()
    for c in studies:
        for m in c.maps:
            if len(m.axes) > 1:
                continue
            columns = ["positions", "computed", "coverage", "traffic_share", "harvest_share"]
            frame = m.classes[[*m.axes, *columns]].rename(
                columns={"traffic_share": "traffic", "harvest_share": "harvest"}
            )
            frame["log2 ratio (95 %)"] = [ratio_in_words(row) for row in m.classes.to_dict("records")]
            print_frame(console, frame, f"{c.run}: coverage by {m.name}", {"traffic": ".1%", "harvest": ".1%"})
        console.print(paragraph(c), markup=False, highlight=False)
        for note in c.notes:
            console.print(f"note: {note}", markup=False, highlight=False)
        for name, why in c.missing_axes.items():
            console.print(f"[yellow]axis {name} was left out[/]: {why}")
        for path in weights[c.run].values():
            console.print(f"weights: {path}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: [bold]{folder / 'coverage.html'}[/]", soft_wrap=True)
