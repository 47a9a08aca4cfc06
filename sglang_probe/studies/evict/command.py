"""`sglang-probe evict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.studies.evict.config import EvictionConfig
    from sglang_probe.studies.evict.study import EvictionResult


def command(
    experiment: Annotated[Path, typer.Argument(help="YAML of the study; see experiments/eviction/.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the study; default: `<output>/<name>`.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Run everything again.")] = False,
    resume: Annotated[bool, typer.Option(help="Keep the stages that are complete, run the rest.")] = False,
    report_only: Annotated[bool, typer.Option(help="Study the files that are there; start no engine.")] = False,
    plan: Annotated[bool, typer.Option(help="Print what would be run, and stop.")] = False,
) -> None:
    """Compare eviction methods on captured attention and, in the engine, by what is generated from kept sets.

    One full-cache harvest captures queries, keys and values; every method selects under every budget and protocol and
    is judged offline; then each kept set is run for real. Writes `report.html`, `summary.json` and `tables/`.
    """
    from rich.console import Console

    from sglang_probe.config import load_config
    from sglang_probe.harvest.progress import Terminal
    from sglang_probe.report.page import write
    from sglang_probe.studies.evict.config import EvictionConfig
    from sglang_probe.studies.evict.page import eviction_page
    from sglang_probe.studies.evict.runs import prepare, read
    from sglang_probe.studies.evict.runs import run as record
    from sglang_probe.studies.evict.stages import study_files
    from sglang_probe.studies.evict.study import write_summary

    console = Console()
    terminal = Terminal(console)
    config = load_config(experiment, EvictionConfig)
    name = config.name or experiment.stem
    folder = output or config.output / name
    if report_only:
        runs = read(config, folder)
    else:
        with terminal.stage("checking model and workloads"):
            prepared = prepare(config)
        _print_plan(console, config, {t: len(p.workload.requests) for t, p in prepared.items()})
        if plan:
            return
        runs = record(prepared, config, folder, overwrite=overwrite, resume=resume, reporter=terminal)
    with terminal.stage("studying"):
        result = study_files(config, folder, name, runs)
    with terminal.stage("writing the report"):
        write_summary(result, folder)
        write(eviction_page(result), folder / "report.html")
    _print_result(console, result)
    console.print(f"report: [bold]{folder / 'report.html'}[/]", soft_wrap=True)
    raise typer.Exit(0 if result.ok else 1)


def _print_plan(console: Console, config: EvictionConfig, requests: dict[str, int]) -> None:
    """Engine starts, requests and kept sets, before anything runs."""
    import pandas as pd

    from sglang_probe.cli.output import print_frame
    from sglang_probe.studies.evict.stages import counts

    found = counts(config, requests)
    print_frame(console, pd.DataFrame(found.rows), "plan: requests by task", {})
    told = f"{found.policies} policies, {len(config.budgets)} budgets, {len(config.protocols)} protocols: "
    console.print(told + f"{found.kept:,} kept sets at most, {found.requests:,} requests, {found.starts} engine starts")


def _print_result(console: Console, result: EvictionResult) -> None:
    from sglang_probe.cli.output import print_frame
    from sglang_probe.studies.evict.tables import accuracy_table, mass_table, predictor_table, stages_table

    if result.outcomes:
        frame, title = accuracy_table(result)
        print_frame(console, frame, title, dict.fromkeys(map(str, frame.columns[2:]), ".2f"))
    frame, title = mass_table(result)
    print_frame(console, frame, title, dict.fromkeys(map(str, frame.columns[2:]), ".2f"))
    if len(result.predictors):
        frame, title = predictor_table(result)
        print_frame(console, frame, title, dict.fromkeys(["spearman", "low", "high"], ".2f"))
    print_frame(console, stages_table(result), "wall time", {"s": ".1f"})
    if len(result.excluded):
        left = int(result.excluded["requests"].sum())
        console.print(f"{left:,} selections were left out; the reasons are in the report")
    console.print(
        f"kept counts asserted on {result.asserted:,} selections and {result.asserted_in_engine:,} requests served"
    )
    if result.sanity is not None:
        colour = "green" if result.sanity.holds else "bold red"
        console.print(
            f"[{colour}]budget 100 % gives the full cache's tokens in {result.sanity.exact} of "
            f"{result.sanity.requests} requests[/]"
        )
        if not result.sanity.holds:
            console.print(
                "  to fix: in 16-bit dtypes near-ties fall either way, as they do when the full cache is served in "
                "another order; repeat with `dtype: float32` to tell them from a fault"
            )
