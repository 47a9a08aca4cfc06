"""`sglang-probe ab`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.harvest.config import ExperimentConfig


def command(
    experiment: Annotated[Path, typer.Argument(help="YAML with model, workload and arms; see experiments/.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the experiment; default: `<output>/<name>`.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Run every arm again.")] = False,
    skip_bad: Annotated[bool, typer.Option(help="Pass over malformed lines of the workload, and count them.")] = False,
    resume: Annotated[bool, typer.Option(help="Keep complete arms, finish the interrupted one, run the rest.")] = False,
    report_only: Annotated[bool, typer.Option(help="Study the runs that are there; start no engine.")] = False,
) -> None:
    """Run several policies over the same requests with the same output tokens, and compare them.

    The first arm samples its outputs; the others decode the same tokens through the real decode path. Each arm runs
    at least twice, so that every difference stands beside the difference of an arm to itself. What SGLang can change
    while it runs is changed while it runs; the plan says for which runs it is started. Writes `report.html`.
    """
    from rich.console import Console

    from sglang_probe.cli.output import print_frame
    from sglang_probe.config import load_config
    from sglang_probe.harvest.card import write_card
    from sglang_probe.harvest.config import ExperimentConfig, with_skip_bad
    from sglang_probe.harvest.pair import run_names, run_pair
    from sglang_probe.harvest.prepare import Prepared
    from sglang_probe.harvest.progress import Terminal
    from sglang_probe.ledger.run import load_run
    from sglang_probe.report.page import write
    from sglang_probe.report.pair import pair_page
    from sglang_probe.study.pair import study_pair, write_summary

    console = Console()
    terminal = Terminal(console)
    config = with_skip_bad(load_config(experiment, ExperimentConfig), skip_bad)
    name = config.name or experiment.stem
    folder = output or config.output / name
    if report_only:
        runs = {run: load_run(folder / run) for run, _ in run_names(config)}
    else:
        with terminal.stage("checking model and workload"):
            prepared = Prepared(config, config.arms)
        _print_plan(console, config, len(prepared.workload.requests))
        runs = run_pair(prepared, config, folder, overwrite=overwrite, resume=resume, reporter=terminal)
        for run in runs.values():
            write_card(run)
    with terminal.stage("studying"):
        result = study_pair(runs, dict(run_names(config)), name)
        write_summary(result, folder / "summary.json")
        write(pair_page(result), folder / "report.html")

    shown = {"run": "run", "prompt_tokens": "prompt", "computed": "computed", "reused": "reused", "generated": "output"}
    shown |= {"sglang_cached_tokens": "SGLang", "seconds": "s", "tokens_per_second": "tok/s"}
    tokens = result.totals[list(shown)].rename(columns=shown)
    print_frame(console, tokens, "tokens per run", {"s": ".1f", "tok/s": ",.0f"})
    pivot = result.by_segment.pivot(index="segment", columns="arm", values="coverage")
    order = list(dict.fromkeys(result.by_segment["segment"]))
    arms = list(config.arms)
    frame = pivot.loc[order, arms].reset_index()
    counts = result.by_segment.drop_duplicates("segment").set_index("segment")["positions"]
    frame.insert(1, "positions", [int(counts[s]) for s in order])
    print_frame(console, frame, "coverage (computed share of prompt positions)", dict.fromkeys(arms, ".1%"))
    drift = result.drift_summary()
    drift["hook_point"] = drift["hook_point"].str.replace("blocks.", "").str.replace("hook_", "")
    drift.columns = [c.replace("identical", "same").replace("l2_", "") for c in drift.columns]
    shares = {c: ".1%" for c in drift.columns if c.endswith("same")}
    print_frame(
        console, drift, "rows that both arms computed: bit-identical share and relative L2, effect beside floor", shares
    )
    reconciled, requests = int(result.totals["requests_reconciled"].sum()), int(result.totals["requests"].sum())
    console.print(f"reused count equals SGLang's cached_tokens in {reconciled} of {requests} requests")
    for run_name, checks in result.checks.items():
        for c in checks:
            if not c.holds:
                console.print(f"[bold red]VIOLATED[/] in {run_name}: {c.name}: {c.violation}")
    if result.ok:
        covered = sum(c.covered for checks in result.checks.values() for c in checks if c.name == "content")
        console.print(f"[green]all invariants hold[/] ({covered:,} rows proved to belong to their tokens)")
    console.print(f"report: [bold]{folder / 'report.html'}[/]")
    raise typer.Exit(0 if result.ok else 1)


def _print_plan(console: Console, config: ExperimentConfig, requests: int) -> None:
    """What will run in which order, what is changed in the running engine, and what needs a start of SGLang."""
    import pandas as pd

    from sglang_probe.cli.output import print_frame
    from sglang_probe.harvest.plan import START_SECONDS, plan

    rows = []
    for p in plan(config):
        arm = config.arms[p.arm]
        set_now = arm.switches(config.server).model_dump(exclude_none=True)
        told = {} if arm.bypass is None else {"requests": arm.bypass}
        partners = {} if arm.partners is None else {"partners": f"{arm.partners.count} {arm.partners.draw}"}
        started_with = {k: v for k, v in arm.start_args(config.server).items() if k not in config.server}
        started_with |= {} if arm.dtype is None else {"dtype": arm.dtype}
        rows.append(
            {
                "run": p.name,
                "engine": "start" if p.starts_engine else "keep",
                "started with": _text(started_with),
                "set while it runs": _text({**set_now, **told, **partners}),
            }
        )
    starts = sum(p.starts_engine for p in plan(config))
    print_frame(console, pd.DataFrame(rows), f"plan: {len(rows)} runs of {requests} requests", {})
    console.print(f"{starts} starts of SGLang, about {START_SECONDS} s each; the first run will tell about the rest")


def _text(values: dict[str, object]) -> str:
    return ", ".join(f"{k}: {v}" for k, v in values.items())
