"""`sglang-probe harvest`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sglang_probe.studies.base import example_option, schema_option

if TYPE_CHECKING:
    from sglang_probe.harvest.config import HarvestConfig

EXAMPLE = """
# sglang-probe harvest mine.yaml
model: smollm2-135m               # a name from `sglang-probe model list`, a folder, or a hub id
workload:
  source: jsonl                   # {"messages": [...]} or {"prompt": "..."} a line; also sharegpt, shared_prefix
  path: prompts.jsonl
sampling: {max_new_tokens: 64, temperature: 0.0}
hook_points: [hook_embed, blocks.10.hook_resid_post]    # rows to capture; [] records the ledger alone
rows: {window: 32, decode: {every: 4}}                  # which positions; leave it out for all
"""


def _config() -> type[HarvestConfig]:
    from sglang_probe.harvest.config import HarvestConfig

    return HarvestConfig


def command(
    config: Annotated[Path, typer.Argument(help="YAML of the harvest; `--example` prints one.")],
    output: Annotated[Path | None, typer.Option(help="Run directory; default: `<output>/<name>` of the YAML.")] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Delete the run directory if it exists, and record it again.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option(help="Skip records of the workload that cannot be used, and count them.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Finish an interrupted run: serve only what is missing. A complete run is kept.")
    ] = False,
    example: Annotated[bool, example_option(EXAMPLE)] = False,
    schema: Annotated[bool, schema_option(_config)] = False,
) -> None:
    """Run a workload through SGLang and write a run directory: ledger, captured rows, manifest.

    Of prompts that begin alike the first is computed before the others are sent, so that what they share is computed
    once; `order: as_given` sends all in the order of the file. `upload: {to: URL}` copies the run to another place
    while it is recorded.

    A request that SGLang refuses is recorded as refused, and the rest is served. Ctrl-C, SIGTERM and SIGHUP close the
    run as incomplete; `--resume` finishes it.

    Every token position of every request is recorded: whether it was computed or reused from the prefix cache, in which
    forward pass, and where its captured rows are. Read it with `sglang_probe.load_run(path)`; check it with
    `sglang-probe verify`.

    The YAML must have `workload`: a file of prompts, or one of the built-in sources.

    Example: `sglang-probe harvest mine.yaml --output runs/mine`
    """
    from rich.console import Console

    from sglang_probe.cli.remote import finish
    from sglang_probe.config import load_config
    from sglang_probe.harvest.config import HarvestConfig, with_skip_bad
    from sglang_probe.harvest.directory import refuse_soon
    from sglang_probe.harvest.experiment import RunSpec, record
    from sglang_probe.harvest.prepare import prepare
    from sglang_probe.harvest.progress import Terminal
    from sglang_probe.harvest.withholding import settle_withheld, withhold_recorded
    from sglang_probe.privacy.withhold import is_scrubbed
    from sglang_probe.remote.process import Uploading
    from sglang_probe.remote.target import Target
    from sglang_probe.report.tables import Column, Table
    from sglang_probe.report.terminal import print_table
    from sglang_probe.studies.coverage.card import write_card
    from sglang_probe.studies.coverage.prompts import coverage_by_segment

    console = Console()
    cfg = with_skip_bad(load_config(config, HarvestConfig), skip_bad)
    name = cfg.name or config.stem
    path = output or cfg.output / name
    settle_withheld(path)
    refuse_soon(path, overwrite=overwrite, resume=resume)
    if cfg.upload is not None:
        Target(cfg.upload.to)  # refused before anything is served
    if resume and cfg.withhold is not None and is_scrubbed(path):
        console.print(f"{path} is complete, and positions are withheld already", markup=False, soft_wrap=True)
        if cfg.upload is not None:
            finish(Uploading(path, cfg.upload, single=True), console, path, cfg.upload.to)
        return
    terminal = Terminal(console)
    with terminal.stage("checking model and workload"):
        prepared = prepare(cfg, {"arm": cfg.arm})
    spec = RunSpec(path.name, prepared.workload.requests, cfg.arm)
    # What is to be withheld is on disk while it is recorded, and must not leave this machine.
    early = cfg.upload is not None and cfg.withhold is None
    uploading = Uploading(path, cfg.upload, single=True, overwrite=overwrite) if early and cfg.upload else None
    try:
        runs = record([spec], prepared, path.parent, overwrite=overwrite, resume=resume, reporter=terminal)
    except BaseException:
        if uploading is not None:
            uploading.end()  # what is there goes out all the same, by a process that nobody waits for
        raise
    run = runs[spec.name]
    if cfg.withhold is not None:
        run = withhold_recorded(run, Path(prepared.model.path), cfg.withhold)
    write_card(run)
    if cfg.upload is not None:
        uploading = uploading or Uploading(path, cfg.upload, single=True, overwrite=overwrite)
        finish(uploading, console, path, cfg.upload.to)

    columns = [Column("segment"), Column("coverage", kind="percent")]
    columns += [Column(c) for c in ("positions", "computed", "reused")]
    print_table(console, Table(coverage_by_segment(run.iter_tokens()), "coverage by segment", columns=columns))
    if prepared.workload.skipped:
        console.print(prepared.workload.skipped_in_words, style="yellow", markup=False, soft_wrap=True)
    if refused := run.manifest.get("refused"):
        rid, why = next(iter(refused.items()))
        console.print(f"SGLang refused {len(refused)} of {len(prepared.workload.requests)} requests", style="yellow")
        console.print(f"  {rid}: {why}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"run directory: [bold]{path}[/]   check it: sglang-probe verify {path}", soft_wrap=True)
