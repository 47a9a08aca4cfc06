"""`sglang-probe harvest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    config: Annotated[Path, typer.Argument(help="YAML: model, workload, hook points, arm. See experiments/.")],
    output: Annotated[Path | None, typer.Option(help="Run directory; default: `<output>/<name>` of the YAML.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the run directory if it exists.")] = False,
    skip_bad: Annotated[bool, typer.Option(help="Pass over malformed lines of the workload, and count them.")] = False,
    resume: Annotated[
        bool, typer.Option(help="Finish an interrupted run, serving missing requests only; keep a complete one.")
    ] = False,
) -> None:
    """Run a workload through SGLang and write a run directory: ledger, captured rows, manifest.

    Every token position of every request is accounted for: computed or reused from the prefix cache, in which forward
    pass, and where its captured rows are. Read it with `sglang_probe.load_run(path)`; check it with
    `sglang-probe verify`.
    """
    from rich.console import Console

    from sglang_probe.config import load_config
    from sglang_probe.harvest.config import HarvestConfig, with_skip_bad
    from sglang_probe.harvest.experiment import RunSpec, record
    from sglang_probe.harvest.prepare import prepare
    from sglang_probe.harvest.progress import Terminal
    from sglang_probe.studies.coverage.card import write_card
    from sglang_probe.studies.coverage.prompts import coverage_by_segment

    console = Console()
    cfg = with_skip_bad(load_config(config, HarvestConfig), skip_bad)
    name = cfg.name or config.stem
    path = output or cfg.output / name
    terminal = Terminal(console)
    with terminal.stage("checking model and workload"):
        prepared = prepare(cfg, {"arm": cfg.arm})
    spec = RunSpec(path.name, prepared.workload.requests, cfg.arm)
    runs = record([spec], prepared, path.parent, overwrite=overwrite, resume=resume, reporter=terminal)
    run = runs[spec.name]
    write_card(run)

    from sglang_probe.cli.output import print_frame

    print_frame(console, coverage_by_segment(run.tokens()), "coverage by segment")
    if prepared.workload.skipped:
        console.print(f"{prepared.workload.skipped} malformed lines were skipped", style="yellow")
    console.print(f"run directory: [bold]{path}[/]   check it: sglang-probe verify {path}", soft_wrap=True)
