"""Training on rows that are not kept: requests are recorded some at a time, trained on, and forgotten.

Each part is a run directory in memory (`/dev/shm`, else a temporary folder), read with the same exclusions as any, and
deleted. All dictionaries of the training see each batch, one after another, so that a row is recorded once for all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_probe.errors import ConfigError, RunDirectoryError
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
from sglang_probe.sae.stream import Buffer
from sglang_probe.sae.train import NORM_ROWS, Task, course, norm_scale, require_sae_lens
from sglang_probe.studies.base import plain
from sglang_probe.studies.sae_train.config import SaeTrainConfig, Streamed
from sglang_probe.studies.sae_train.study import (
    LEAST_HELD_OUT,
    RESULT,
    SERVED,
    TRAINING,
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
    """Records parts, and keeps count of what they were."""

    def __init__(
        self,
        config: SaeTrainConfig,
        record: Callable[[Sequence[Request], int], Harvested | None],
        status: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._config, self._record, self._status = config, record, status
        self.number = 0
        self.left_out: Harvested | None = None
        """Without rows; counts and the largest limit of all parts."""
        self.rows = 0
        """Distinct rows to train on: those of the first pass over the workload."""
        self.served = 0
        """All rows to train on that were recorded; a workload that is served again counts again."""
        self._passes = 0
        self._sum: Any = 0.0
        self._squares = 0.0

    def serve(self, requests: Sequence[Request], *, train: bool) -> Iterator[Harvested]:
        """The rows of requests, part by part."""
        self._passes += train
        for some in parts_of(requests, _harvest(self._config).requests):
            what = "to train on" if train else "to judge by"
            self._status(f"recording part {self.number}, {len(some)} requests {what}; {self.rows:,} rows so far")
            rows = self._record(some, self.number)
            self._status("")
            self.number += 1
            if rows is None or not len(rows):
                continue
            if train:
                self.served += len(rows)
                if self._passes == 1:
                    self._count(rows)
            yield rows

    @property
    def variance(self) -> float:
        """Of all rows that were trained on."""
        return float(self._squares / self.rows - np.square(self._sum / self.rows).sum())

    def _count(self, rows: Harvested) -> None:
        nothing = rows.only(np.zeros(0, np.int64))
        self.left_out = nothing if self.left_out is None else joined([self.left_out, nothing])
        for batch in rows.batches():
            x = batch.double()
            self._sum = self._sum + x.sum(0).numpy()
            self._squares += float(x.square().sum())
            self.rows += len(x)


class Recorder:
    """Records requests into a folder that is deleted once their rows were read."""

    def __init__(self, config: SaeTrainConfig, prepared: Prepared, engines: EngineHost, scratch: Path) -> None:
        self._config, self._prepared, self._engines, self._scratch = config, prepared, engines, scratch
        self.model: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._manifests = hashlib.sha256()
        self._counts = {name: Counter[str]() for name in ("positions_by_status", "positions_by_phase")}
        self._parts = 0

    def __call__(self, requests: Sequence[Request], number: int) -> Harvested | None:
        """Rows of the requests; None if nothing was computed."""
        config, path = self._config, self._scratch / f"part-{number}"
        points = tuple(dict.fromkeys((EMBED, config.hook_point)))
        job = job_of(self._prepared, path.name, requests, arm=_harvest(config).arm, hook_points=points)
        run = record_job(job, path, self._engines, overwrite=True)
        try:
            self._note(facts_of_run(run), model_of([run]))
            if not run.row_count():
                return None
            how: dict[str, Any] = {"sinks": config.exclude.sinks(), "deduplicate": config.deduplicate}
            try:
                rows = harvested([run], config.hook_point, where=config.where, weight=config.weight, **how)
            except ConfigError:  # nothing of this part is left; were it so of all, the buffer would say so
                return None
            return replace(rows, x_ND=rows.x_ND.clone())  # nothing of the files is held on to
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def facts(self) -> dict[str, Any]:
        """What stands in a manifest in place of the runs."""
        counts = {name: dict(counted) for name, counted in self._counts.items()}
        hashes = {"manifest_sha256": None, "manifests_of_parts_sha256": self._manifests.hexdigest()}
        return {**self._facts, **counts, **hashes, "rows_kept": False, "parts": self._parts}

    def _note(self, facts: Mapping[str, Any], model: dict[str, Any]) -> None:
        self.model = self.model or model
        self._parts += 1
        self._manifests.update(str(facts["manifest_sha256"]).encode())
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
        RunDirectoryError: a training is there; one that was interrupted cannot go on, because its rows are gone.
        ProbeError: a recording failed.
    """
    names = wanted(config)
    identity = stream_identity(config, prepared)
    done = all((folder / n / RESULT).exists() for n, *_ in names)
    if resume and (folder / TRAINING).exists() and not done:
        raise RunDirectoryError(
            f"{folder} holds a training that was interrupted, and its rows were not kept",
            fix="--overwrite begins it again; record the rows first (`sglang-probe harvest`) to be able to resume",
        )
    open_folder(folder, identity, overwrite=overwrite, resume=resume)
    if resume and done:
        return
    with EngineHost() as engines, _scratch() as scratch:
        recorder = Recorder(config, prepared, engines, scratch)
        parts = Parts(config, recorder, status)
        training, held_out_requests = split_requests(config, prepared.workload.requests)
        held_out = _held_out(config, parts, held_out_requests)
        buffer = Buffer(
            lambda: parts.serve(training, train=True),
            _harvest(config).buffer_rows,
            None if config.mix is None else {str(k): v for k, v in config.mix.items()},
            config.order_seed,
        )
        scale, made = learn(config, buffer, held_out, folder, tell)
    assert parts.left_out is not None
    counted = {"train": parts.rows, "held_out": len(held_out), "epoch": buffer.epoch_rows, "kept": False}
    counted |= {"served": parts.served, "fills_of_the_buffer": buffer.fills, "parts": parts.number}
    identity["rows"] |= counted
    journal.write_text_durably(folder / SERVED, json.dumps(counted, indent=1) + "\n")
    facts = [recorder.facts(), *(facts_of_run(load_run(p)) for p in config.evaluate_on)]
    left_out, variance = parts.left_out, parts.variance
    material = Material(held_out, scale, identity, recorder.model, facts, left_out, variance, buffer.epoch_rows)
    for (name, latents, seed), trained in zip(names, made, strict=True):
        judge_and_write(config, material, trained, folder / name, latents, seed)


def learn(
    config: SaeTrainConfig, buffer: Buffer, held_out: Harvested, folder: Path, tell: Callable[[str], Tell]
) -> tuple[float, list[Any]]:
    """Train all dictionaries on the same batches, step by step; the scale of the rows, and what was trained."""
    require_sae_lens()
    batches = buffer.batches(config.batch_size)
    first = [next(batches)]
    wanted_rows = min(NORM_ROWS, buffer.epoch_rows)
    while sum(map(len, first)) < wanted_rows:
        first.append(next(batches))
    scale = norm_scale([torch.cat(first)[:wanted_rows]])
    shown = curve_rows(held_out)
    lessons = [
        course(
            Task(config.recipe, latents, seed, None, scale, shown, folder / name, checkpoint_every=config.samples),
            tell(name),
        )
        for name, latents, seed in wanted(config)
    ]
    for lesson in lessons:
        next(lesson)
    made: list[Any] = []
    for rows in chain(first, batches):
        for lesson in lessons:
            try:
                lesson.send(rows)
            except StopIteration as end:
                made.append(end.value)
        if made:
            return scale, made
    raise AssertionError("the buffer never ends")


def _held_out(config: SaeTrainConfig, parts: Parts, requests: Sequence[Request]) -> Harvested:
    """Rows to judge by, recorded before the others: as many as are wanted, and no more parts than that needs."""
    if config.evaluate_on:
        runs = [load_run(p) for p in config.evaluate_on]
        refuse_mixed_models(runs)
        how: dict[str, Any] = {"sinks": config.exclude.sinks(), "deduplicate": config.deduplicate}
        return sampled(harvested(runs, config.hook_point, where=config.where, **how), config.evaluation_rows)
    found: list[Harvested] = []
    for rows in parts.serve(requests, train=False):
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
