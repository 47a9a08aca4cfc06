"""`sglang-probe query-drift`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="Run directory with captured queries and keys of some layers.")],
    window: Annotated[int, typer.Option(help="Last prompt positions that count as the observation window.")] = 32,
    layer: Annotated[
        list[int] | None, typer.Option(help="Layer to study; may be given several times. Default: all captured ones.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Kept share of the prompt where kept sets are judged.")] = 0.25,
    output: Annotated[Path | None, typer.Option(help="Folder; default: `query-drift` in the run directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The summary on standard output.")] = False,
) -> None:
    """How far decode queries are from the prompt window that eviction methods score with, and whether it matters.

    Cosines before and behind RoPE, excess over distance, subspaces, functional drift, how long the window's choice
    predicts, change points, negative controls, and which queries exist at all. Writes Parquet tables, `summary.json`
    and `report.html`. Needs no SGLang. The run must hold `blocks.<layer>.attn.hook_rot_q` and `hook_rot_k`; with
    `hook_q` the queries before RoPE are the engine's own.
    """
    import json

    from rich.console import Console

    from sglang_probe.cli.output import print_frame
    from sglang_probe.config import parse_config
    from sglang_probe.report.page import write
    from sglang_probe.run.run import load_run
    from sglang_probe.studies.query_drift.options import DriftOptions
    from sglang_probe.studies.query_drift.page import drift_page
    from sglang_probe.studies.query_drift.study import study_drift

    opened = load_run(run)
    options = parse_config({"window": window, "budget": budget}, DriftOptions, where="options")
    console = Console(stderr=as_json)
    with console.status("studying") as status:
        result = study_drift(opened, options, layers=layer, tell=status.update)
    folder = output or run / "query-drift"
    folder.mkdir(parents=True, exist_ok=True)
    result.write_tables(folder)
    text = json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")
    write(drift_page(result), folder / "report.html")
    if as_json:
        typer.echo(text)
        raise typer.Exit(0 if result.ok else 1)
    steps = result.found.steps
    wide = steps[steps["layer"] == "all"].pivot(index="metric", columns="step", values="value").reset_index()
    wide.columns = [str(c) for c in wide.columns]
    print_frame(console, wide, f"{result.requests} requests: means by decode step (first of its bin)")
    columns = ["layer", "baseline", "requests", "failed", "median", "median_low", "median_high", "recall"]
    horizon = result.found.horizon[[*columns, "baseline_recall"]]
    print_frame(console, horizon, "steps for which the window predicts", {"recall": ".1%", "baseline_recall": ".1%"})
    for why, count in result.left_out.items():
        console.print(f"[yellow]left out[/]: {count} requests: {why}")
    for c in result.checks:
        if not c.holds:
            console.print(f"[bold red]VIOLATED[/]: {c.name}: {c.violation}")
    console.print(f"report: [bold]{folder / 'report.html'}[/]", soft_wrap=True)
    raise typer.Exit(0 if result.ok else 1)
