"""The stages of an eviction study, each resumable: full cache, offline grid, in-engine runs, tables."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.progress import Quiet, Reporter
from sglang_probe.run.run import Run
from sglang_probe.studies.evict.asked import KeptSets, asked_of
from sglang_probe.studies.evict.config import Decode, EvictionConfig
from sglang_probe.studies.evict.layers import batches
from sglang_probe.studies.evict.lookahead_runs import SPECKV, Ahead, collect, first_pass, second_pass, steps_needed
from sglang_probe.studies.evict.offline import Offline, run_offline, spoiled
from sglang_probe.studies.evict.runs import FULL, arms, full_runs, open_folder, run_arm, run_full, run_lookahead
from sglang_probe.studies.evict.study import (
    EXCLUDED_FILE,
    HEADS_FILE,
    OFFLINE_FILE,
    EvictionResult,
    study_eviction,
)

STAGES_FILE = "stages.json"


@dataclass(frozen=True)
class Counts:
    """What a study will run."""

    rows: list[dict[str, Any]]
    policies: int
    kept: int
    requests: int
    starts: int


def counts(config: EvictionConfig, requests: dict[str, int]) -> Counts:
    """Requests of each task, and in all: kept sets, requests, engine starts. Exclusions can only lower them."""
    entries = config.entries
    evicting = sum(e.evicts for e in entries)
    cells = len(config.budgets) * len(config.protocols)
    rows, total = [], 0
    starts = 1 + (1 + config.teacher_forced if config.in_engine else 0)
    for task, n in requests.items():
        sets = n * (evicting * cells + len(config.protocols))
        row: dict[str, Any] = {"task": task, "full cache": 2 * n, "kept sets": sets}
        if config.in_engine:
            for name, decode, _ in arms(config):
                sane = len(config.protocols) if not decode.temperature else 0
                row[name] = n * decode.repeats * (1 + evicting * cells + sane)
        rows.append(row)
        total += sum(v for k, v in row.items() if isinstance(v, int) and k != "kept sets")
    return Counts(rows, len(entries), sum(r["kept sets"] for r in rows), total, starts)


class Clock:
    """Wall time of each stage, kept on disk, so that a resumed study still knows what its stages took."""

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        self._file = folder / STAGES_FILE
        known = {} if fresh or not self._file.exists() else json.loads(self._file.read_text(encoding="utf-8"))
        self.seconds: dict[str, float] = known.get("seconds", {})
        self.asserted: int = known.get("asserted", 0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; one that fails leaves no time behind, one that had nothing left to do keeps its own."""
        began = time.perf_counter()
        yield
        self.seconds[name] = max(round(time.perf_counter() - began, 2), self.seconds.get(name, 0.0))
        self.write()

    def write(self) -> None:
        """Make what is known durable."""
        text = json.dumps({"seconds": self.seconds, "asserted": self.asserted}, indent=2)
        self._file.write_text(text + "\n", encoding="utf-8")


def run_study(
    prepared: dict[str, Prepared],
    config: EvictionConfig,
    folder: Path,
    name: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> EvictionResult:
    """Run every stage that is not there yet, and study the files.

    Raises:
        ProbeError: as the stages do; what is complete stays and is kept by `resume`.
    """
    reporter = reporter or Quiet()
    open_folder(folder, config, overwrite=overwrite, resume=resume)
    clock = Clock(folder, fresh=overwrite)
    again: Any = {"overwrite": overwrite, "resume": resume, "reporter": reporter}
    selected = (folder / OFFLINE_FILE).exists() and not overwrite
    with EngineHost() as host:
        with clock.stage("full cache"):
            runs = run_full(prepared, config, folder, host, **again)
        if not selected:
            with clock.stage("lookahead"):
                ahead = _look_ahead(prepared, config, runs, folder, host, **again)
    if not selected:
        with clock.stage("offline grid"):
            clock.asserted = select_and_judge(prepared, config, runs, ahead, folder, reporter)
    if config.in_engine:
        with EngineHost() as host:
            # Ways of decoding that share an engine come together.
            for arm, decode, forced in arms(config):
                for task, ours in prepared.items():
                    with clock.stage(f"{task}, {arm}"):
                        _run_arm(ours, config, task, arm, decode, forced, folder, host, **again)
    with reporter.stage("studying"), clock.stage("statistics"):
        return _studied(config, folder, name, runs, clock)


def _run_arm(
    ours: Prepared,
    config: EvictionConfig,
    task: str,
    arm: str,
    decode: Decode,
    forced: bool,
    folder: Path,
    host: EngineHost,
    **again: Any,
) -> None:
    """One way of decoding of one task."""
    asked = asked_of(
        pd.read_parquet(folder / f"{task}.cells.parquet"),
        [r.rid for r in ours.workload.requests],
        task=task,
        temperature=decode.temperature,
        repeats=decode.repeats,
        forced=forced,
    )
    asked.to_parquet(folder / f"{task}.{arm}.asked.parquet")
    bare = copy.copy(ours)
    bare.config = config.bare(task, ours.model.layers if forced else None)
    run_arm(bare, asked, folder / f"{task}.{arm}", folder / f"{task}.kept.safetensors", host, **again)


def read_study(config: EvictionConfig, folder: Path, name: str) -> EvictionResult:
    """Study the files of a study that was run."""
    return _studied(config, folder, name, full_runs(config, folder), Clock(folder, fresh=False))


def _look_ahead(
    prepared: dict[str, Prepared],
    config: EvictionConfig,
    runs: dict[str, dict[str, Run]],
    folder: Path,
    host: EngineHost,
    **again: Any,
) -> dict[str, Ahead]:
    """Lookahead queries of every task, on the engine of the full-cache runs."""
    out = {task: Ahead() for task in prepared}
    needed = steps_needed(config.entries)
    if not needed or not config.in_engine:
        return out
    for task, ours in prepared.items():
        layers = list(range(ours.model.layers))
        found = list(batches(runs[task][FULL], layers, model=ours.model.path))
        prompts = {r.rid: r.prompt_ids for r in ours.workload.requests}
        asked = list(first_pass(found, needed, config.budgets, config.protocols, config.trivial, prompts))
        first = run_lookahead(ours, asked, folder / f"{task}.lookahead", host, **again)
        collect([a for a in asked if a.at[1] != SPECKV], first, layers, into=out[task])
        if drafts := second_pass(asked, first):
            second = run_lookahead(ours, drafts, folder / f"{task}.drafts", host, **again)
            collect(drafts, second, layers, into=out[task])
    return out


def select_and_judge(
    prepared: dict[str, Prepared],
    config: EvictionConfig,
    runs: dict[str, dict[str, Run]],
    ahead: dict[str, Ahead],
    folder: Path,
    reporter: Reporter,
) -> int:
    """The offline grid: writes its tables and the kept sets of every task.

    Returns:
        Requests whose kept counts were asserted.
    """
    out, entries = Offline(), config.entries
    for task, ours in prepared.items():
        layers = list(range(ours.model.layers)) if config.layers is None else config.layers
        found = list(batches(runs[task][FULL], layers, model=ours.model.path))
        kept = KeptSets()
        steps = len(found) * len(config.protocols) * (len(entries) + len(spoiled(config.controls)))
        with reporter.requests(f"{task}: selecting and judging", steps) as counter:
            run_offline(
                task,
                found,
                entries,
                config.budgets,
                config.protocols,
                config.trivial,
                controls_of=config.controls,
                ahead=ahead[task],
                out=out,
                keep=kept.add if config.in_engine else None,
                advance=lambda counter=counter: counter.advance(0),  # type: ignore[misc]
            )
        if config.in_engine:
            for batch in found:
                for protocol in config.protocols:
                    kept.add_everything(task, protocol, batch)
            kept.write(folder / f"{task}.kept.safetensors", folder / f"{task}.cells.parquet")
    rows, heads, excluded = out.frames()
    heads.to_parquet(folder / HEADS_FILE)
    excluded.to_parquet(folder / EXCLUDED_FILE)
    rows.to_parquet(folder / OFFLINE_FILE)  # last: that it is there means that the stage is complete
    return out.asserted


def _studied(
    config: EvictionConfig, folder: Path, name: str, runs: dict[str, dict[str, Run]], clock: Clock
) -> EvictionResult:
    outcome = "accuracy" if config.cut is None else "agreement"
    decodes = [(arm, forced) for arm, _, forced in arms(config)] if config.in_engine else []
    return study_eviction(
        folder,
        name,
        config.model_dump(mode="json", exclude={"output"}),
        config.entries,
        {task: r[FULL] for task, r in runs.items()},
        decodes,
        resamples=config.resamples,
        seed=config.seed,
        seconds=clock.seconds,
        asserted=clock.asserted,
        outcome=outcome,
    )
