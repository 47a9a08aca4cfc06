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
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run
from sglang_probe.studies.evict.asked import KeptSets
from sglang_probe.studies.evict.config import SETTLED, EvictionConfig
from sglang_probe.studies.evict.layers import batches
from sglang_probe.studies.evict.lookahead_runs import Ahead
from sglang_probe.studies.evict.needed import NEEDED_FILE, read_needed
from sglang_probe.studies.evict.offline import Offline, run_offline, spoiled
from sglang_probe.studies.evict.study import (
    EXCLUDED_FILE,
    HEADS_FILE,
    OFFLINE_FILE,
    EvictionResult,
    study_eviction,
)

if TYPE_CHECKING:
    from sglang_probe.harvest.prepare import Prepared
    from sglang_probe.harvest.progress import Reporter

FULL, REFERENCE = "full", "reference"
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
        row: dict[str, Any] = {"task": task, "full cache": 2 * n, "kept sets": sets}
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
    runs: Mapping[str, Mapping[str, Run]],
    ahead: Mapping[str, Ahead],
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
        needed = read_needed(folder, task)
        found = list(batches(runs[task][FULL], layers, model=ours.model.path, needed=needed))
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


def study_files(
    config: EvictionConfig, folder: Path, name: str, runs: Mapping[str, Mapping[str, Run]]
) -> EvictionResult:
    """Study the files of a study.

    Args:
        runs: as `runs.run` or `runs.read` gives them.
    """
    clock = Clock(folder, fresh=False)
    if "statistics" in clock.seconds:
        return _studied(config, folder, name, runs, clock)
    with clock.stage("statistics"):
        return _studied(config, folder, name, runs, clock)


def _studied(
    config: EvictionConfig, folder: Path, name: str, runs: Mapping[str, Mapping[str, Run]], clock: Clock
) -> EvictionResult:
    outcome = "accuracy" if config.cut is None else "agreement"
    decodes = [(arm, forced) for arm, _, forced in config.decodes] if config.in_engine else []
    return study_eviction(
        folder,
        name,
        config.model_dump(mode="json", exclude={"output", *SETTLED}),
        config.entries,
        {task: r[FULL] for task, r in runs.items()},
        decodes,
        seconds=clock.seconds,
        asserted=clock.asserted,
        outcome=outcome,
    )
