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
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.errors import ConfigError
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.prepare import prepare as check
from sglang_probe.run import journal
from sglang_probe.run.run import load_run
from sglang_probe.sae.harvested import Harvested, harvested, held_out_families, joined, refuse_mixed_models
from sglang_probe.sae.manifest import facts_of_run
from sglang_probe.sae.stream import Buffer, Position
from sglang_probe.sae.train import NORM_ROWS, Course, Task, Trained, norm_scale, require_sae_lens
from sglang_probe.studies.base import plain
from sglang_probe.studies.sae_train import checkpoint
from sglang_probe.studies.sae_train.config import SaeTrainConfig
from sglang_probe.studies.sae_train.parts import NOT_KEPT, Parts, Recorder, harvest_of, parts_of
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

_SHARED_MEMORY = Path("/dev/shm")
_ROOM = 2 << 30
"""Bytes that must be free there."""
_PREFIX, _LOCK = "sglang-probe-stream-", "lock"


def prepare_stream(config: SaeTrainConfig) -> Prepared:
    """Check model and workload; starts no engine.

    Raises:
        ProbeError: as `sglang_probe.harvest.prepare.prepare`.
    """
    return check(harvest_of(config), {"arm": harvest_of(config).arm})


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


def stream_identity(config: SaeTrainConfig, prepared: Prepared) -> dict[str, Any]:
    """All that decides what is trained."""
    training, held_out = split_requests(config, prepared.workload.requests)
    steer = harvest_of(config).steer
    identity: dict[str, Any] = plain(
        {
            "config": config.identity(),
            "weight": config.weight if isinstance(config.weight, str) else journal.sha256(config.weight),
            "runs": NOT_KEPT,
            "harvest": {
                "workload_digest": digest_of(prepared.workload.requests),
                **harvest_of(config).model_dump(
                    include={"dtype", "sampling", "arm", "requests", "buffer_rows", "server", "rows"}
                ),
                "steer": None if steer is None else steer.model_dump(mode="json", include={"deployment"}),
                "library": None if prepared.library is None else prepared.library.hash,
            },
            "evaluate_on": [facts_of_run(load_run(p))["manifest_sha256"] for p in config.evaluate_on],
            "model": prepared.model.name,
            "weights_sha256": prepared.model.identity["weights_sha256"],
            "hook_point": config.hook_point,
            "rows": {"requests": len(training), "requests_held_out": len(held_out)},
        }
    )
    return identity


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
    harvest = harvest_of(config)
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
            recorder.forces = int({**harvest.server, **harvest.arm.server}.get("tp_size", 1)) == 1
        recorder.outputs = {}
        scale, made, resumed = learn(config, Stream(buffer, parts, recorder), held_out, folder, saved, tell)
    counted: dict[str, Any] = {
        "train": parts.rows,
        "held_out": len(held_out),
        "epoch": buffer.epoch_rows,
        "kept": False,
    }
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
    for rows in parts.held_out(requests, harvest_of(config).requests):
        found.append(rows)
        if sum(map(len, found)) >= config.evaluation_rows:
            break
    if sum(map(len, found)) < LEAST_HELD_OUT:
        raise ConfigError("too few rows were recorded to judge by", fix="serve more requests, or hold out more")
    return sampled(joined(found), config.evaluation_rows)


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
