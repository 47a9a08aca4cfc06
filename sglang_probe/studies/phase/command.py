"""`sglang-probe phase`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    experiment: Annotated[Path, typer.Argument(help="YAML of the study; see experiments/phase/.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the study; default: `<output>/<name>`.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Run everything again.")] = False,
    resume: Annotated[bool, typer.Option(help="Keep complete runs, finish the interrupted one, run the rest.")] = False,
    report_only: Annotated[bool, typer.Option(help="Study the runs that are there; start no engine.")] = False,
) -> None:
    """Compare prefill with decode: human text, the model's own text prefilled again, and the same text decoded.

    Decoded against prefilled again, same tokens and positions, is numerics; the model's text against human text, both
    prefilled, is content. Every text is cut to a prompt and a continuation, and only continuations are compared. Writes
    `report.html` and `phase.json`.
    """
    import json

    from rich.console import Console

    from sglang_probe.cli.output import print_frame
    from sglang_probe.config import load_config
    from sglang_probe.harvest.progress import Terminal
    from sglang_probe.report.page import write
    from sglang_probe.studies.coverage.card import write_card
    from sglang_probe.studies.phase.config import PhaseConfig
    from sglang_probe.studies.phase.page import phase_page
    from sglang_probe.studies.phase.runs import prepare, read
    from sglang_probe.studies.phase.runs import run as record
    from sglang_probe.studies.phase.study import study_phase

    console = Console()
    terminal = Terminal(console)
    config = load_config(experiment, PhaseConfig)
    name = config.name or experiment.stem
    folder = output or config.output / name
    if report_only:
        runs = read(config, folder)
    else:
        with terminal.stage("checking model and texts"):
            prepared = prepare(config)
        runs = record(prepared, config, folder, overwrite=overwrite, resume=resume, reporter=terminal)
        for replicates in runs.values():
            for run in replicates:
                write_card(run)
    start, end = config.prompt_tokens, config.prompt_tokens + config.continuation_tokens
    with terminal.stage("studying"):
        result = study_phase(runs, start, end, name)
        (folder / "phase.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
        write(phase_page(result), folder / "report.html")
    columns = ["hook_point", "kind", "norm", "mean", "variance", "kurtosis", "outliers"]
    title = f"rows of {result.positions:,} continuation positions of {result.texts} texts"
    print_frame(console, result.moments[columns], title, {"outliers": ".3%"})
    shown = result.probes.rename(columns={"null_low": "null from", "null_high": "null to"})
    title = "linear probe on unseen texts: AUC with its 95 % interval, and its range with exchanged labels"
    print_frame(console, shown, title, dict.fromkeys(["auc", "low", "high", "null from", "null to"], ".3f"))
    floors = result.numerics[["hook_point", "identical_effect", "identical_floor", "effect", "floor", "verdict"]]
    named = {"identical_effect": "same", "identical_floor": "floor same"}
    formats = {"same": ".1%", "floor same": ".1%", "effect": ".2g", "floor": ".2g"}
    print_frame(console, floors.rename(columns=named), "numerics: decoded against reforward, relative L2", formats)
    for run_name, checks in result.checks.items():
        for c in checks:
            if not c.holds:
                console.print(f"[bold red]VIOLATED[/] in {run_name}: {c.name}: {c.violation}")
    console.print(f"report: [bold]{folder / 'report.html'}[/]", soft_wrap=True)
    raise typer.Exit(0 if result.ok else 1)
