"""The stages of an eviction study that need no engine: its folder and plan, the offline grid, and its tables."""

from __future__ import annotations

import glob
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.journal import sha256
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.evict.asked import KeptSets
from sglang_probe.studies.evict.config import SETTLED, EvictionConfig
from sglang_probe.studies.evict.lookahead_runs import AheadRuns
from sglang_probe.studies.evict.needed import NEEDED_FILE, read_needed
from sglang_probe.studies.evict.pieces import KEPT, Grid, Piece, merge
from sglang_probe.studies.evict.study import (
    EXCLUDED_FILE,
    HEADS_FILE,
    OFFLINE_FILE,
    EvictionResult,
    study_eviction,
)
from sglang_probe.studies.partials import Partials, identity
from sglang_probe.studies.workers import compute, side_by_side

if TYPE_CHECKING:
    from sglang_probe.harvest.prepare import Prepared
    from sglang_probe.harvest.progress import Counter, Reporter

FULL = "full"
EXPERIMENT_FILE = "experiment.json"
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
        row: dict[str, Any] = {"task": task, "full cache": n, "kept sets": sets}
        if config.in_engine:
            for name, decode, _ in config.decodes:
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
        """Time a stage; one that fails has no time, one that had nothing left to do keeps its own."""
        began = time.perf_counter()
        yield
        self.seconds[name] = max(round(time.perf_counter() - began, 2), self.seconds.get(name, 0.0))
        self.write()

    def write(self) -> None:
        """Make what is known durable."""
        text = json.dumps({"seconds": self.seconds, "asserted": self.asserted}, indent=2)
        self._file.write_text(text + "\n", encoding="utf-8")


def open_folder(folder: Path, config: EvictionConfig, *, overwrite: bool, resume: bool) -> None:
    """Make or check the folder of a study. What its runs depend on is checked with them, by their manifests.

    Raises:
        RunDirectoryError: it holds a study, and neither `overwrite` nor `resume` was asked; or another study.
    """
    file, wanted = folder / EXPERIMENT_FILE, json.loads(json.dumps(config.grid))
    if file.exists() and not overwrite:
        if not resume:
            raise RunDirectoryError(f"{folder} holds a study", fix="--resume finishes it, --overwrite runs it again")
        found = json.loads(file.read_text(encoding="utf-8"))
        changed = [k for k in wanted if found.get(k) != wanted[k]]
        if changed:
            raise RunDirectoryError(f"{folder} holds a study with another `{changed[0]}`", fix="use --overwrite")
    if file.exists() and overwrite:
        # Otherwise an interrupted overwrite would be resumed with stages of the study that it replaces.
        _discard(folder, json.loads(file.read_text(encoding="utf-8"))["workloads"])
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _discard(folder: Path, tasks: Iterable[str]) -> None:
    """Delete the tables of a study and all runs and kept sets of its tasks."""
    for name in (OFFLINE_FILE, HEADS_FILE, EXCLUDED_FILE, NEEDED_FILE):
        (folder / name).unlink(missing_ok=True)
    for path in (p for task in tasks for p in folder.glob(f"{glob.escape(task)}.*")):
        if (path / MANIFEST).exists():
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def select_and_judge(
    prepared: Mapping[str, Prepared],
    config: EvictionConfig,
    runs: Mapping[str, Run],
    ahead: Mapping[str, AheadRuns],
    folder: Path,
    reporter: Reporter,
) -> int:
    """The offline grid: writes its tables and the kept sets of every task. Pieces that an interrupted call of the same
    study finished are kept.

    Args:
        runs: the full-cache run of each task.

    Returns:
        Requests whose kept counts were asserted.
    """
    model = next(iter(prepared.values())).model
    layers = list(range(model.layers)) if config.layers is None else config.layers
    read = [*runs.values(), *(load_run(path) for task in ahead.values() for path, _ in task.recorded)]
    searched = folder / NEEDED_FILE
    depends_on = {
        "grid": config.grid,
        "runs": [identity(run) for run in read],
        "needed": sha256(searched) if searched.exists() else None,
    }
    partials = Partials(folder, depends_on, resume=True)
    full = {task: run.path for task, run in runs.items()}
    needed = {task: read_needed(folder, task) for task in prepared}
    grid = Grid(config, layers, full, model.path, dict(ahead), needed, partials)
    parts = []
    for task in prepared:
        pieces = [Piece(task, i, group) for i, group in enumerate(grid.reader(task).groups())]
        todo = [p for p in pieces if partials.read(p.name) is None]
        steps, told = grid.steps(len(pieces)), 0
        with reporter.requests(f"{task}: selecting and judging", steps) as counter:

            def advance(done: int, counter: Counter = counter) -> None:
                nonlocal told
                for _ in range(done - told):
                    counter.advance(0)
                told = max(told, done)

            kept_steps = grid.steps(len(pieces) - len(todo))
            advance(kept_steps)
            computed = compute(
                todo,
                grid,
                processes=side_by_side(len(todo)),
                advance=lambda done, kept_steps=kept_steps: advance(kept_steps + done),  # type: ignore[misc]
            )
            for _ in computed:
                pass
            advance(steps)
        kept = KeptSets()
        for piece in pieces:
            found, path = partials.read(piece.name), partials.path(piece.name)
            assert found is not None
            assert path is not None
            parts.append(found)
            if config.in_engine:
                kept.extend(path / KEPT, found["cells"])
        if config.in_engine:
            kept.write(folder / f"{task}.kept.safetensors")
            kept.cells.to_parquet(folder / f"{task}.cells.parquet")
    tables = merge(parts)
    tables["heads"].to_parquet(folder / HEADS_FILE)
    tables["excluded"].to_parquet(folder / EXCLUDED_FILE)
    tables["offline"].to_parquet(folder / OFFLINE_FILE)  # last: that it is there means that the stage is complete
    partials.discard()
    return int(tables["counts"]["asserted"].sum())


def study_files(config: EvictionConfig, folder: Path, name: str, runs: Mapping[str, Run]) -> EvictionResult:
    """Study the files of a study.

    Args:
        runs: as `runs.run` or `runs.read` gives them.
    """
    clock = Clock(folder, fresh=False)
    if "statistics" in clock.seconds:
        return _studied(config, folder, name, runs, clock)
    with clock.stage("statistics"):
        return _studied(config, folder, name, runs, clock)


def _studied(config: EvictionConfig, folder: Path, name: str, runs: Mapping[str, Run], clock: Clock) -> EvictionResult:
    outcome = "accuracy" if config.cut is None else "agreement"
    decodes = [(arm, forced) for arm, _, forced in config.decodes] if config.in_engine else []
    return study_eviction(
        folder,
        name,
        config.model_dump(mode="json", exclude={"output", *SETTLED}),
        config.entries,
        runs,
        decodes,
        seconds=clock.seconds,
        asserted=clock.asserted,
        outcome=outcome,
    )
