"""`sglang-probe factorial`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    experiment: Annotated[Path, typer.Argument(help="YAML of the study; see experiments/factorial/.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the study; default: `<output>/<name>`.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Run everything again.")] = False,
    resume: Annotated[bool, typer.Option(help="Keep complete runs, finish the interrupted one, run the rest.")] = False,
    report_only: Annotated[bool, typer.Option(help="Study the runs that are there; start no engine.")] = False,
) -> None:
    """Content by position: what pseudo queries say of the real decoding, by what they say and where they stand.

    Decodes every prompt, samples another continuation, and runs pseudo tokens of five contents at four positions behind
    the prompt, in one engine. Writes `cells.parquet`, `summary.json` and `report.html`.
    """
    import json

    from rich.console import Console

    from sglang_probe.cli.output import print_frame
    from sglang_probe.config import load_config
    from sglang_probe.harvest.model import model_folder
    from sglang_probe.harvest.progress import Terminal
    from sglang_probe.report.page import write
    from sglang_probe.studies.coverage.card import write_card
    from sglang_probe.studies.factorial.config import FactorialConfig
    from sglang_probe.studies.factorial.page import factorial_page
    from sglang_probe.studies.factorial.runs import prepare, read
    from sglang_probe.studies.factorial.runs import run as record
    from sglang_probe.studies.factorial.study import study_factorial

    console = Console()
    terminal = Terminal(console)
    config = load_config(experiment, FactorialConfig)
    name = config.name or experiment.stem
    folder = output or config.output / name
    if report_only:
        runs = read(config, folder)
        model = model_folder(config.model)
    else:
        with terminal.stage("checking model and prompts"):
            prepared = prepare(config)
        model = prepared.model.path
        runs = record(prepared, config, folder, overwrite=overwrite, resume=resume, reporter=terminal)
        for run in runs.values():
            write_card(run)
    with terminal.stage("studying"):
        result = study_factorial(runs, config.options, name, model=model)
        result.rows.to_parquet(folder / "cells.parquet", index=False, compression="zstd")
        text = json.dumps(result.to_json()) + "\n"
        (folder / "summary.json").write_text(text, encoding="utf-8")
        write(factorial_page(result), folder / "report.html")
    columns = ["source", "outcome", "SC&SP", "DC&SP", "SC&DP", "DC&DP", "content", "position", "interaction"]
    print_frame(console, result.table[columns], "cosine to the true decode queries", dict.fromkeys(columns[2:], ".3f"))
    for run_name, checks in result.checks.items():
        for c in checks:
            if not c.holds:
                console.print(f"[bold red]VIOLATED[/] in {run_name}: {c.name}: {c.violation}")
    console.print(f"report: [bold]{folder / 'report.html'}[/]", soft_wrap=True)
    raise typer.Exit(0 if result.ok else 1)
