"""`sglang-probe ab`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.studies.ab.config import AbConfig
    from sglang_probe.studies.ab.study import PairResult


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
    from sglang_probe.harvest.config import with_skip_bad
    from sglang_probe.harvest.progress import Terminal
    from sglang_probe.report.page import write
    from sglang_probe.studies.ab.config import AbConfig
    from sglang_probe.studies.ab.page import pair_page
    from sglang_probe.studies.ab.plan import run_names
    from sglang_probe.studies.ab.runs import prepare, read
    from sglang_probe.studies.ab.runs import run as record
    from sglang_probe.studies.ab.study import study_pair, write_summary
    from sglang_probe.studies.coverage.card import write_card

    console = Console()
    terminal = Terminal(console)
    config = with_skip_bad(load_config(experiment, AbConfig), skip_bad)
    name = config.name or experiment.stem
    folder = output or config.output / name
    if report_only:
        runs = read(config, folder)
    else:
        with terminal.stage("checking model and workload"):
            prepared = prepare(config)
        _print_plan(console, config, len(prepared.workload.requests))
        runs = record(prepared, config, folder, overwrite=overwrite, resume=resume, reporter=terminal)
        for run in runs.values():
            write_card(run)
    with terminal.stage("studying"):
        result = study_pair(runs, dict(run_names(config)), name, baseline=config.baseline, margin=config.margin)
        write_summary(result, folder / "summary.json")
        write(pair_page(result), folder / "report.html")

    shown = {"run": "run", "prompt_tokens": "prompt", "computed": "computed", "reused": "reused", "generated": "output"}
    shown |= {"sglang_cached_tokens": "SGLang", "seconds": "s", "tokens_per_second": "tok/s"}
    tokens = result.totals[list(shown)].rename(columns=shown)
    print_frame(console, tokens, "tokens per run", {"s": ".1f", "tok/s": ",.0f"})
    _print_coverage(console, result)
    _print_floors(console, result)
    reconciled, requests = int(result.totals["requests_reconciled"].sum()), int(result.totals["requests"].sum())
    console.print(f"reused count equals SGLang's cached_tokens in {reconciled} of {requests} requests")
    for run_name, checks in result.checks.items():
        for c in checks:
            if not c.holds:
                console.print(f"[bold red]VIOLATED[/] in {run_name}: {c.name}: {c.violation}")
    if result.ok:
        covered = sum(c.covered for checks in result.checks.values() for c in checks if c.name == "content")
        console.print(f"[green]all invariants hold[/] ({covered:,} rows proved to belong to their tokens)")
    console.print(f"report: [bold]{folder / 'report.html'}[/]", soft_wrap=True)
    raise typer.Exit(0 if result.ok else 1)


def _print_coverage(console: Console, result: PairResult) -> None:
    """Computed share of prompt positions, segments by arms; the longer of the two runs down."""
    from sglang_probe.cli.output import print_frame

    arms, segments = (list(dict.fromkeys(result.by_segment[c])) for c in ("arm", "segment"))
    pivot = result.by_segment.pivot(index="segment", columns="arm", values="coverage").loc[segments, arms]
    title = "coverage (computed share of prompt positions)"
    if len(arms) > 3:
        frame = pivot.T.reset_index()
        print_frame(console, frame, title, dict.fromkeys(segments, ".1%"))
        return
    counts = result.by_segment.drop_duplicates("segment").set_index("segment")["positions"]
    frame = pivot.reset_index()
    frame.insert(1, "positions", [int(counts[s]) for s in segments])
    print_frame(console, frame, title, dict.fromkeys(arms, ".1%"))


def _print_floors(console: Console, result: PairResult) -> None:
    """Effect beside floor at the deepest hook point; the report has all."""
    import pandas as pd

    from sglang_probe.cli.output import print_frame

    if result.floors.empty:
        return
    deepest = result.floors["hook_point"].iloc[-1]
    rows = []
    for arm, part in result.floors.groupby("arm", sort=False):
        if (part["verdict"] == "bit-identical").all():
            rows.append({"arm": arm, "phase": "all", "same": 1.0, "verdict": "bit-identical at every hook point"})
            continue
        for r in part[part["hook_point"] == deepest].to_dict("records"):
            same = {"same": r["identical_effect"], "floor same": r["identical_floor"]}
            rows.append({"arm": arm, **{k: r[k] for k in ("phase", "effect", "floor", "verdict")}, **same})
    columns = ["arm", "phase", "same", "floor same", "effect", "floor", "verdict"]
    formats = {"same": ".1%", "floor same": ".1%", "effect": ".2g", "floor": ".2g"}
    title = f"{deepest} against `{result.baseline}`: bit-identical share and mean relative L2, effect beside floor"
    print_frame(console, pd.DataFrame(rows).reindex(columns=columns), title, formats)
    if result.floors["verdict"].str.endswith("no test").any():
        families = int(result.floors["clusters"].max())
        console.print(f"no test: {families} prefix families are too few for an interval; use six or more")
    if len(result.flips):
        print_frame(console, result.flips, "outputs were not forced: where they part")


def _print_plan(console: Console, config: AbConfig, requests: int) -> None:
    """What will run in which order, what is changed in the running engine, and what needs a start of SGLang."""
    import pandas as pd

    from sglang_probe.cli.output import print_frame
    from sglang_probe.studies.ab.plan import START_SECONDS, plan

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
