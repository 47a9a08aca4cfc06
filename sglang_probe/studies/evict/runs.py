"""The runs of an eviction study: full-cache runs with captured attention rows, then runs under kept sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.kept_requests import ASKS, requests_of
from sglang_probe.harvest.model import resolve_model
from sglang_probe.harvest.prepare import Prepared, check_requests, require_asks
from sglang_probe.harvest.prepare import prepare as check
from sglang_probe.harvest.progress import Quiet, Reporter
from sglang_probe.kept_set import write_kept
from sglang_probe.run.hook_points import EMBED, RESID_POST
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.evict.asked import asked_of
from sglang_probe.studies.evict.config import Decode, EvictionConfig
from sglang_probe.studies.evict.layers import Reader
from sglang_probe.studies.evict.lookahead_runs import (
    SPECKV,
    AheadRuns,
    Asked,
    first_pass,
    second_pass,
    steps_needed,
)
from sglang_probe.studies.evict.needed import NEEDED_FILE, record_needed
from sglang_probe.studies.evict.requests import forced, kept_request, lookahead_request, with_truth
from sglang_probe.studies.evict.stages import FULL, Clock, counts, open_folder, select_and_judge
from sglang_probe.studies.evict.study import OFFLINE_FILE
from sglang_probe.workload.build import check_fits
from sglang_probe.workload.request import Request

__all__ = ["prepare", "read", "run"]


def prepare(config: EvictionConfig) -> dict[str, Prepared]:
    """Check every task: model, requests and what they are judged by; starts no engine.

    Raises:
        ProbeError: as `sglang_probe.harvest.prepare.prepare`. ConfigError: a task has no right answers and there is no
            `cut`, or the other way round. InventoryError: the installed SGLang was not reviewed for kept sets.
    """
    if config.in_engine:
        require_asks({"evict"})
    recording = config.recording(resolve_model(config.model).layers)
    out = {}
    for task, workload in config.workloads.items():
        prepared = check(recording, workload=workload)
        requests = tuple(with_truth(task, prepared.workload.requests, config.cut))
        _check_task(task, requests, prepared, config)
        out[task] = replace(prepared, workload=replace(prepared.workload, requests=requests))
    # Tasks share engines, and every recording of a task has as many requests as the largest.
    pool = replace(prepared.pool, least=max(_pool(ours, config) for ours in out.values()))
    return {task: replace(ours, pool=pool) for task, ours in out.items()}


def _pool(ours: Prepared, config: EvictionConfig) -> int:
    """Tokens of the KV pool of a task: of the recording with most requests, each with lookahead or pseudo tokens."""
    copies = max((n for n in counts(config, {"": 1}).rows[0].values() if isinstance(n, int)), default=1)
    more = max(steps_needed(config.entries).values(), default=0) + 1 if config.in_engine else 0
    return ours.pool.tokens(ours.workload.requests, copies=copies, more=more)


def _check_task(task: str, requests: Sequence[Request], prepared: Prepared, config: EvictionConfig) -> None:
    """Refuse before anything is recorded what would be found out after the full cache: a budget that evicts nothing,
    and lookahead tokens that do not fit."""
    longest = max(len(r.prompt_ids) for r in requests)
    for budget in config.budgets:
        if isinstance(budget, int) and budget >= longest:
            raise ConfigError(f"task `{task}`: a budget of {budget} evicts nothing: no prompt is longer than {longest}")
    check_requests([forced(r) for r in requests], prepared)
    needed = steps_needed(config.entries) if config.in_engine else {}
    most = max(needed, key=needed.__getitem__, default="")
    for r in requests if needed else ():
        try:
            check_fits(len(r.prompt_ids), {"max_new_tokens": needed[most] + 1}, prepared.room)
        except ProbeError as e:
            raise e.at(f"{r.where}: lookahead of `{most}`") from e


def run(
    prepared: dict[str, Prepared],
    config: EvictionConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Run]:
    """Record and select: the full cache, lookahead queries, the offline grid, and what is generated from kept sets.

    Returns what `read` returns. With `resume`, runs are kept or finished as `sglang_probe.harvest.experiment.record`
    does, and the grid is kept if it is complete.

    Raises:
        RunDirectoryError: the folder holds a study and neither `overwrite` nor `resume` was asked; or another study.
        ProbeError: a stage failed.
    """
    reporter = reporter or Quiet()
    open_folder(folder, config, overwrite=overwrite, resume=resume)
    clock = Clock(folder, fresh=overwrite)
    again: Any = {"overwrite": overwrite, "resume": resume, "reporter": reporter}
    if config.needed and not (folder / NEEDED_FILE).exists():
        with clock.stage("needed positions"):
            record_needed(prepared, config.protocols, config.trivial.sinks, folder, reporter, seed=config.seed)
    selected = (folder / OFFLINE_FILE).exists()
    with EngineHost() as host:
        with clock.stage("full cache"):
            runs = {task: _full(ours, config, task, folder, host=host, **again) for task, ours in prepared.items()}
        if not selected:
            with clock.stage("lookahead"):
                ahead = {
                    task: _look_ahead(ours, config, task, runs[task], folder, host=host, **again)
                    for task, ours in prepared.items()
                }
    if not selected:
        with clock.stage("offline grid"):
            clock.asserted = select_and_judge(prepared, config, runs, ahead, folder, reporter)
    if config.in_engine:
        with EngineHost() as host:
            # Ways of decoding that share an engine come together.
            for arm, decode, is_forced in config.decodes:
                for task, ours in prepared.items():
                    with clock.stage(f"{task}, {arm}"):
                        _decode(ours, task, arm, decode, is_forced, folder, host=host, **again)
    return runs


def read(config: EvictionConfig, folder: Path) -> dict[str, Run]:
    """The full-cache run of each task.

    Raises:
        RunDirectoryError: one is missing.
    """
    return {task: load_run(folder / f"{task}.{FULL}") for task in config.workloads}


def _full(ours: Prepared, config: EvictionConfig, task: str, folder: Path, **how: Any) -> Run:
    """The run that `read` reads."""
    name = f"{task}.{FULL}"
    asks = ASKS if config.in_engine else ()
    return record([RunSpec(name, ours.workload.requests)], ours, folder, asks=asks, **how)[name]


def _look_ahead(ours: Prepared, config: EvictionConfig, task: str, full: Run, folder: Path, **how: Any) -> AheadRuns:
    """Lookahead queries of a task, on the engine of the full-cache runs."""
    needed = steps_needed(config.entries)
    if not needed or not config.in_engine:
        return AheadRuns()
    sources = {r.rid: r for r in ours.workload.requests}
    prompts = {rid: r.prompt_ids for rid, r in sources.items()}
    reader = Reader(full, range(ours.model.layers), model=ours.model.path)

    def recorded(asked: list[Asked], name: str) -> Run:
        path = folder / f"{name}.kept.safetensors"
        kept = {a.rid: a.kept for a in asked if a.kept is not None}
        if kept:
            write_kept(path, kept)
        requests = requests_of([lookahead_request(a, sources[a.source]) for a in asked], ours.config.sampling)
        return record([RunSpec(name, requests, kept=path if kept else None)], ours, folder, asks=ASKS, **how)[name]

    batches = map(reader.read, reader.groups())
    asked = list(first_pass(batches, needed, config.budgets, config.protocols, config.protection, prompts))
    first = recorded(asked, f"{task}.lookahead")
    found = [(first, [a for a in asked if a.at[1] != SPECKV])]
    if drafts := second_pass(asked, first):
        found.append((recorded(drafts, f"{task}.drafts"), drafts))
    return AheadRuns(tuple((run.path, tuple(replace(a, kept=None) for a in mine)) for run, mine in found))


def _decode(ours: Prepared, task: str, arm: str, decode: Decode, is_forced: bool, folder: Path, **how: Any) -> None:
    """Serve the requests of one task and one way of decoding under their kept sets."""
    sources = {r.rid: r for r in ours.workload.requests}
    asked = asked_of(
        pd.read_parquet(folder / f"{task}.cells.parquet"),
        list(sources),
        task=task,
        temperature=decode.temperature,
        repeats=decode.repeats,
        forced=is_forced,
    )
    requests = requests_of([kept_request(r, sources[r.source]) for r in asked.itertuples()], ours.config.sampling)
    # For the likelihood of a reference, what predicts it.
    points = [EMBED, f"blocks.{ours.model.layers - 1}.{RESID_POST}"] if is_forced else []
    kept = folder / f"{task}.kept.safetensors"
    record([RunSpec(f"{task}.{arm}", requests, hook_points=points, kept=kept)], ours, folder, asks=ASKS, **how)
    asked.to_parquet(folder / f"{task}.{arm}.asked.parquet")
