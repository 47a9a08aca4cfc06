"""Training on rows that are not kept: requests are recorded some at a time, trained on, and forgotten.

Each part is a run directory in memory (`/dev/shm`, else a temporary folder), read with the same exclusions as any, and
deleted. All dictionaries of the training see each batch, one after another, so that a row is recorded once for all.

A training that ends before its time goes on from its last checkpoint (`checkpoint.py`): the parts that were in the
buffer are recorded again, with the same output tokens, and the rows that were used are passed over. So no row is used
twice or left out; only the numbers of rows that are recorded again may differ in their last bits, because an engine may
put other requests into a batch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.harvest.experiment import record_job
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.job import job_of
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.prepare import prepare as check
from sglang_probe.run import journal
from sglang_probe.run.hook_points import EMBED
from sglang_probe.run.run import load_run
from sglang_probe.sae.harvested import Harvested, harvested, held_out_families, joined, refuse_mixed_models
from sglang_probe.sae.manifest import facts_of_run, model_of
from sglang_probe.sae.stream import Buffer, Position
from sglang_probe.sae.train import NORM_ROWS, Course, Task, Trained, norm_scale, require_sae_lens
from sglang_probe.studies.base import plain
from sglang_probe.studies.sae_train import checkpoint
from sglang_probe.studies.sae_train.config import SaeTrainConfig, Streamed
from sglang_probe.studies.sae_train.study import (
    LEAST_HELD_OUT,
    RESULT,
    SERVED,
    Material,
    Tell,
    curve_rows,
    judge_and_write,
    open_folder,
    sampled,
    wanted,
)
from sglang_probe.workload.build import digest_of
from sglang_probe.workload.request import Request

NOT_KEPT = "recorded and forgotten"
_SHARED_MEMORY = Path("/dev/shm")
_ROOM = 2 << 30
"""Bytes that must be free there."""
_PREFIX, _LOCK = "sglang-probe-stream-", "lock"


def prepare_stream(config: SaeTrainConfig) -> Prepared:
    """Check model and workload; starts no engine.

    Raises:
        ProbeError: as `sglang_probe.harvest.prepare.prepare`.
    """
    return check(_harvest(config), {"arm": _harvest(config).arm})


def split_requests(config: SaeTrainConfig, requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """Requests to train on, and those of the families that are held out (none with `evaluate_on`).

    Raises:
        ConfigError: there is only one family.
    """
    if config.evaluate_on:
        return list(requests), []
    names = sorted({r.family or r.rid for r in requests})
    if len(names) < 2:
        raise ConfigError("nothing can be held out: all requests are of one family", fix="name runs in `evaluate_on`")
    held = held_out_families(names, config.held_out)
    return [r for r in requests if (r.family or r.rid) not in held], [
        r for r in requests if (r.family or r.rid) in held
    ]


def parts_of(requests: Sequence[Request], size: int) -> list[list[Request]]:
    """The requests, so many at a time."""
    return [list(requests[i : i + size]) for i in range(0, len(requests), size)]


def stream_identity(config: SaeTrainConfig, prepared: Prepared) -> dict[str, Any]:
    """All that decides what is trained."""
    training, held_out = split_requests(config, prepared.workload.requests)
    identity: dict[str, Any] = plain(
        {
            "config": config.identity(),
            "weight": config.weight if isinstance(config.weight, str) else journal.sha256(config.weight),
            "runs": NOT_KEPT,
            "harvest": {
                "workload_digest": digest_of(prepared.workload.requests),
                **_harvest(config).model_dump(
                    include={"dtype", "sampling", "arm", "requests", "buffer_rows", "server"}
                ),
            },
            "evaluate_on": [facts_of_run(load_run(p))["manifest_sha256"] for p in config.evaluate_on],
            "model": prepared.model.name,
            "hook_point": config.hook_point,
            "rows": {"requests": len(training), "requests_held_out": len(held_out)},
        }
    )
    return identity


class Parts:
    """Records parts, and keeps count of what they were.

    Args:
        training: requests to train on, in parts.
        record: rows of requests, and, where they were recorded before, with which output tokens.
    """

    def __init__(
        self,
        training: Sequence[Sequence[Request]],
        record: Callable[[Sequence[Request], int], Harvested | None],
        status: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._training, self._record, self._status = training, record, status
        self.number = 0
        """Parts that were recorded."""
        self.rows = 0
        """Distinct rows to train on: those of the first pass over the workload."""
        self.served = 0
        """All rows to train on that were recorded; a workload that is served again counts again."""
        self.again = 0
        """Rows that were recorded again after an interruption; not counted otherwise."""
        self.counts = False
        """Whether what is recorded now counts; not while a fill is recorded again."""
        self._seen = 0
        """Parts of the first pass that were counted."""
        self._left_out = _left_out([])
        self._norm_limit = 0.0
        self._sum: Any = 0.0
        self._squares = 0.0

    def training(self, number: int) -> Harvested | None:
        """The rows of a part of the workload."""
        rows = self._served(self._training[number], "to train on")
        if not self.counts:
            self.again += 0 if rows is None else len(rows)
            return rows
        first, self._seen = number >= self._seen, max(self._seen, number + 1)
        if rows is not None:
            self.served += len(rows)
            if first:
                self._count(rows)
        return rows

    def held_out(self, requests: Sequence[Request], size: int) -> Iterator[Harvested]:
        """The rows of requests, so many requests at a time."""
        for some in parts_of(requests, size):
            if (rows := self._served(some, "to judge by")) is not None:
                yield rows

    def requests(self, parts: Iterable[int]) -> set[int]:
        """Numbers of the requests of some parts."""
        return {r.index for number in parts for r in self._training[number]}

    @property
    def variance(self) -> float:
        """Of all rows that were trained on."""
        return float(self._squares / self.rows - np.square(self._sum / self.rows).sum())

    @property
    def left_out(self) -> Harvested:
        """Without rows; counts and the largest limit of all parts."""
        return Harvested(torch.empty((0, 0)), pd.DataFrame(), self._left_out, self._norm_limit)

    def state(self) -> dict[str, Any]:
        """All counts, as plain data."""
        names = ("number", "rows", "served", "again", "_seen", "_norm_limit", "_squares")
        sums = np.asarray(self._sum).tolist()
        return {n: getattr(self, n) for n in names} | {"_sum": sums, "_left_out": self._left_out.to_dict("records")}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on counting from `state`."""
        for name, value in state.items():
            setattr(self, name, value)
        self._sum = np.asarray(self._sum)
        self._left_out = _left_out(state["_left_out"])

    def _served(self, requests: Sequence[Request], what: str) -> Harvested | None:
        self._status(f"recording part {self.number}, {len(requests)} requests {what}; {self.rows:,} rows so far")
        rows = self._record(requests, self.number)
        self._status("")
        self.number += 1
        return rows if rows is not None and len(rows) else None

    def _count(self, rows: Harvested) -> None:
        every = pd.concat([self._left_out, rows.left_out], ignore_index=True)
        self._left_out = every.groupby(["reason", "segment"], as_index=False, sort=True)["rows"].sum()
        self._norm_limit = max(self._norm_limit, rows.norm_limit)
        for batch in rows.batches():
            x = batch.double()
            self._sum = self._sum + x.sum(0).numpy()
            self._squares += float(x.square().sum())
            self.rows += len(x)


def _left_out(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(records, columns=["reason", "segment", "rows"]).astype({"rows": np.int64})


class Recorder:
    """Records requests into a folder that is deleted once their rows were read."""

    def __init__(self, config: SaeTrainConfig, prepared: Prepared, engines: EngineHost, scratch: Path) -> None:
        self._config, self._prepared, self._engines, self._scratch = config, prepared, engines, scratch
        self.model: dict[str, Any] = {}
        self.outputs: dict[int, list[int] | None] = {}
        """Output tokens of the requests that were recorded, by their number."""
        self.forced: Mapping[int, Sequence[int] | None] = {}
        """Output tokens of requests that are recorded again."""
        self.forces = False
        """Whether the engine is started so that it can force them."""
        self._facts: dict[str, Any] = {}
        self._manifests: list[str] = []
        self._counts = {name: Counter[str]() for name in ("positions_by_status", "positions_by_phase")}

    def __call__(self, requests: Sequence[Request], number: int) -> Harvested | None:
        """Rows of the requests; None if nothing was computed."""
        config, path = self._config, self._scratch / f"part-{number}"
        points = tuple(dict.fromkeys((EMBED, config.hook_point)))
        job = job_of(self._prepared, path.name, requests, arm=_harvest(config).arm, hook_points=points)
        if again := all(r.index in self.forced for r in requests):
            outputs = {r.index: self.forced[r.index] for r in requests}
            forced = {i: None if o is None else tuple(o) for i, o in outputs.items()}
            job = replace(job, forced=forced, forced_from=NOT_KEPT, asks=job.asks | {"force"})
        run = record_job(job, path, self._engines, asks=("force",) if self.forces else (), overwrite=True)
        try:
            served = run.requests()
            self.outputs |= {
                int(r.index): None if r.output_ids is None else [int(t) for t in r.output_ids]
                for r in served[["index", "output_ids"]].itertuples(index=False)
            }
            if not again:
                self._note(facts_of_run(run), model_of([run]))
            if not run.row_count():
                return None
            how: dict[str, Any] = {"sinks": config.exclude.sinks(), "deduplicate": config.deduplicate}
            try:
                return harvested([run], config.hook_point, where=config.where, weight=config.weight, **how)
            except ConfigError:  # nothing of this part is left; were it so of all, the buffer would say so
                return None
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def facts(self) -> dict[str, Any]:
        """What stands in a manifest in place of the runs."""
        counts = {name: dict(counted) for name, counted in self._counts.items()}
        digest = hashlib.sha256("".join(self._manifests).encode()).hexdigest()
        hashes = {"manifest_sha256": None, "manifests_of_parts_sha256": digest}
        return {**self._facts, **counts, **hashes, "rows_kept": False, "parts": len(self._manifests)}

    def forget_all_but(self, requests: set[int]) -> None:
        """Keep the output tokens of these requests, by their numbers."""
        self.outputs = {i: o for i, o in self.outputs.items() if i in requests}

    def state(self) -> dict[str, Any]:
        """All counts, as plain data."""
        counts = {name: dict(counted) for name, counted in self._counts.items()}
        return {"model": self.model, "facts": self._facts, "manifests": self._manifests, "counts": counts}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on counting from `state`."""
        self.model, self._facts, self._manifests = state["model"], state["facts"], list(state["manifests"])
        self._counts = {name: Counter(counted) for name, counted in state["counts"].items()}

    def _note(self, facts: Mapping[str, Any], model: dict[str, Any]) -> None:
        self.model = self.model or model
        self._manifests.append(str(facts["manifest_sha256"]))
        self._facts = {n: facts[n] for n in ("policy", "dtype")} | {"name": NOT_KEPT}
        for name, counted in self._counts.items():
            counted.update(facts[name] or {})


def train_stream(
    config: SaeTrainConfig,
    prepared: Prepared,
    folder: Path,
    *,
    overwrite: bool,
    resume: bool,
    tell: Callable[[str], Tell],
    status: Callable[[str], None] = lambda _: None,
) -> None:
    """Record, train and judge every dictionary; nothing of the rows stays.

    Raises:
        RunDirectoryError: a training is there, and neither `overwrite` nor `resume` was asked; or it is another.
        ProbeError: a recording failed.
    """
    names = wanted(config)
    identity = stream_identity(config, prepared)
    open_folder(folder, identity, overwrite=overwrite, resume=resume)
    if resume and all((folder / n / RESULT).exists() for n, *_ in names):
        checkpoint.delete(folder)
        return
    training, held_out_requests = split_requests(config, prepared.workload.requests)
    harvest = _harvest(config)
    saved = checkpoint.read(folder)
    with EngineHost() as engines, _scratch() as scratch:
        recorder = Recorder(config, prepared, engines, scratch)
        parts = Parts(parts_of(training, harvest.requests), recorder, status)
        mix = None if config.mix is None else {str(k): v for k, v in config.mix.items()}
        number = len(parts_of(training, harvest.requests))
        buffer = Buffer(parts.training, number, harvest.buffer_rows, mix, config.order_seed)
        if saved is None:
            held_out = _held_out(config, parts, held_out_requests)
            checkpoint.write_held_out(folder, held_out)
        else:
            recorder.resume(saved.told["recorder"])
            parts.resume(saved.told["parts"])
            held_out = saved.held_out
            recorder.forces = True
        recorder.outputs = {}
        scale, made, resumed = learn(config, Stream(buffer, parts, recorder), held_out, folder, saved, tell)
    counted = {"train": parts.rows, "held_out": len(held_out), "epoch": buffer.epoch_rows, "kept": False}
    counted |= {"served": parts.served, "fills_of_the_buffer": buffer.at.fills, "parts": parts.number}
    counted |= {"resumed": resumed} if resumed else {}
    identity["rows"] |= counted
    journal.write_text_durably(folder / SERVED, json.dumps(counted, indent=1) + "\n")
    facts = [recorder.facts(), *(facts_of_run(load_run(p)) for p in config.evaluate_on)]
    left_out, variance = parts.left_out, parts.variance
    material = Material(held_out, scale, identity, recorder.model, facts, left_out, variance, buffer.epoch_rows)
    for (name, latents, seed), trained in zip(names, made, strict=True):
        judge_and_write(config, material, trained, folder / name, latents, seed)
    checkpoint.delete(folder)


@dataclass(frozen=True)
class Stream:
    """Where the rows of a training come from; the recorder is None where a test gives them."""

    buffer: Buffer
    parts: Parts
    recorder: Recorder | None = None


def learn(
    config: SaeTrainConfig,
    stream: Stream,
    held_out: Harvested,
    folder: Path,
    saved: checkpoint.Saved | None,
    tell: Callable[[str], Tell],
) -> tuple[float, list[Trained], list[dict[str, Any]]]:
    """Train all dictionaries on the same batches, step by step: the scale of the rows, what was trained, and of each
    interruption `step`, `rows_recorded_again` and `rows_lost`."""
    require_sae_lens()
    resumed: list[dict[str, Any]] = [] if saved is None else list(saved.told["resumed"])
    buffer, parts, recorder = stream.buffer, stream.parts, stream.recorder
    if saved is None:
        parts.counts = True
        scale = norm_scale([buffer.first(NORM_ROWS)])
    else:
        scale = saved.told["scale"]
    shown = curve_rows(held_out)
    courses = {
        name: Course(
            Task(config.recipe, latents, seed, None, scale, shown, folder / name),
            tell(name),
            None if saved is None else saved.path / name,
        )
        for name, latents, seed in wanted(config)
    }
    step = next(iter(courses.values())).step
    steps = config.recipe.steps
    if saved is not None:
        before = parts.again
        if step < steps:
            if recorder is not None:
                recorder.forced = saved.outputs
            buffer.resume(saved.told["buffer"], saved.keys)
        else:
            buffer.at = Position(**saved.told["buffer"])
        resumed.append({"step": step, "rows_recorded_again": parts.again - before, "rows_lost": buffer.lost})
        if recorder is not None:
            recorder.forced = {}
        parts.counts = True

    def save() -> None:
        told = {"step": step, "scale": scale, "resumed": resumed, "parts": parts.state()}
        told |= {"recorder": None if recorder is None else recorder.state()}
        if recorder is not None:
            recorder.forget_all_but(parts.requests(buffer.parts_held))
        checkpoint.write(folder, courses, buffer, told, {} if recorder is None else recorder.outputs)

    if saved is None:
        save()
    while step < steps:
        rows = buffer.batch(config.batch_size)
        for course in courses.values():
            course.learn(rows)
        step += 1
        if step % config.checkpoint_every == 0 or step == steps:
            save()
    return scale, [c.trained() for c in courses.values()], resumed


def _held_out(config: SaeTrainConfig, parts: Parts, requests: Sequence[Request]) -> Harvested:
    """Rows to judge by, recorded before the others: as many as are wanted, and no more parts than that needs."""
    if config.evaluate_on:
        runs = [load_run(p) for p in config.evaluate_on]
        refuse_mixed_models(runs)
        how: dict[str, Any] = {"sinks": config.exclude.sinks(), "deduplicate": config.deduplicate}
        return sampled(harvested(runs, config.hook_point, where=config.where, **how), config.evaluation_rows)
    found: list[Harvested] = []
    for rows in parts.held_out(requests, _harvest(config).requests):
        found.append(rows)
        if sum(map(len, found)) >= config.evaluation_rows:
            break
    if sum(map(len, found)) < LEAST_HELD_OUT:
        raise ConfigError("too few rows were recorded to judge by", fix="serve more requests, or hold out more")
    return sampled(joined(found), config.evaluation_rows)


def _harvest(config: SaeTrainConfig) -> Streamed:
    assert config.harvest is not None
    return config.harvest


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in memory if there is room for one, which is gone afterwards.

    What a process that was killed left there is memory until the machine starts again: it is removed now.
    """
    inside = _SHARED_MEMORY if _has_room(_SHARED_MEMORY) else None
    if inside is not None:
        for left in inside.glob(f"{_PREFIX}*/{_LOCK}"):
            with suppress(OSError), open(left) as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its owner is dead
                shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=inside))
    try:
        with open(folder / _LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _has_room(folder: Path) -> bool:
    """Containers have 64 MB of it by default."""
    try:
        return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= _ROOM
    except OSError:
        return False
