"""One run: an engine, requests, an arm, a run directory."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from sglang_probe.engine.hooks.config import ENGINE_FILE, EngineProbeConfig
from sglang_probe.engine.hooks.instruments import require
from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.harvest import directory
from sglang_probe.harvest.death import RESUME, EngineDied, crashed, fault_of
from sglang_probe.harvest.engine import ProbedEngine
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.in_flight import Answer, Asked, Refusal
from sglang_probe.harvest.job import Job, digests, manifest_of, probe_config
from sglang_probe.harvest.kept import keep_with_run
from sglang_probe.harvest.progress import Counter, Quiet, Reporter
from sglang_probe.harvest.replicas import Replicas
from sglang_probe.harvest.requests_table import write_requests
from sglang_probe.harvest.signals import closing
from sglang_probe.policy.partners import group
from sglang_probe.run import journal, seal
from sglang_probe.run.hook_points import EMBED
from sglang_probe.run.manifest import write_manifest
from sglang_probe.run.run import Run, load_run
from sglang_probe.run.scores import WEIGHTS_FILE
from sglang_probe.steering.scores import write_weights
from sglang_probe.verify.ownership import load_embedding, write_oracle
from sglang_probe.workload.request import asked_rid

Todo = Sequence[Asked]
"""Requests to serve."""

Serving = Callable[[ProbedEngine], AsyncIterator[Answer | Refusal]]
"""Serves the requests of a job in a way of its own, and may change `Job.requests` while it does."""


def harvest(
    job: Job,
    path: Path,
    engines: EngineHost,
    *,
    asks: frozenset[str] = frozenset(),
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
    serving: Serving | None = None,
) -> Run:
    """Run an engine over the requests of a job and write the run directory `path`.

    Args:
        engines: keeps the engine for the next run.
        asks: fields of `Ask` that the engine must honour for later runs, beyond those of this one.
        overwrite, resume: what to do if `path` exists; `resume` finishes what is not complete.
        serving: in place of sending every request once and waiting for its answer; by one engine.

    Raises:
        InventoryError: the installed SGLang was not reviewed for what is asked.
        RunDirectoryError: `path` exists, cannot be resumed, or another process records there.
        ProbeError: SGLang refused every request, its engine ended, or the recording failed; the directory says
            `incomplete`, and why.
        KeyboardInterrupt: passed on after the engine ended and the directory was closed as `incomplete`. SIGTERM and
            SIGHUP raise it too.
    """
    if serving is not None and job.prepared.config.replicas > 1:
        raise ConfigError("this recording talks to one engine", fix="leave out `replicas`")
    if path.is_symlink():
        path = path.resolve()
    with directory.hold_directory(path):
        directory.settle(path)
        manifest = manifest_of(job, path)
        if serving is not None:
            manifest["order"] = None  # that one's own
        if resume and (run := directory.complete_run(path, manifest)) is not None:
            return run
        probe = probe_config(job, path, job.asks | asks)
        require(probe)
        start = directory.open_directory(path, manifest, overwrite=overwrite, resume=resume)
        try:
            return _Recording(job, path, engines, probe, manifest, start, reporter or Quiet(), serving).make()
        finally:
            with closing(str(path)):
                directory.close_directory(path)


class _Recording:
    """What is under way in an open directory."""

    def __init__(
        self,
        job: Job,
        path: Path,
        engines: EngineHost,
        probe: EngineProbeConfig,
        manifest: dict[str, Any],
        start: directory.Start,
        reporter: Reporter,
        serving: Serving | None,
    ) -> None:
        self.job, self.path, self.engines, self.start, self.reporter = job, path, engines, start, reporter
        self.serving = serving
        self.probe = probe.model_copy(update={"start": start.number})
        self.manifest = {**manifest, "starts": list(start.earlier)}
        self.answers: list[Answer] = []
        self.refused = dict(start.refused)
        self.seconds = 0.0
        self.again: list[tuple[float, int]] = []
        """Seconds and answers before each engine that took the place of another."""

    def make(self) -> Run:
        engine, todo = self._begin()
        try:
            with self.reporter.requests(f"{self.job.name}: requests", sum(map(len, todo))) as counter:
                began = time.perf_counter()
                try:
                    engine.run(self._serve(engine, todo, counter))
                finally:
                    self.seconds = time.perf_counter() - began
                    self._note_restarts(engine, self.seconds)
            engine.close_recording()
            self.manifest.update(engine.in_force())  # the weights may have been updated
        except BaseException as e:
            with closing(str(self.path)):
                self.engines.stop()  # so that everything it still knows is on disk
                fault = self._why(e)
                try:
                    self._close(fault, e.in_flight if isinstance(e, EngineDied) else ())
                except OSError as again:  # a full disk: the manifest says `incomplete` since the beginning
                    fault = f"{fault}; and the manifest could not say so ({again})"
            if isinstance(e, ProbeError | OSError):
                raise ProbeError(f"the recording of {self.path} is incomplete: {fault}", fix=_fix(e, fault)) from e
            raise
        with closing(str(self.path)):
            self._close(self._all_refused())
        if (fault := self.manifest["fault"]) is not None:
            raise ProbeError(f"the recording of {self.path} is incomplete: {fault}", fix=_fix(None, fault))
        return load_run(self.path)

    def _begin(self) -> tuple[ProbedEngine | Replicas, list[Todo]]:
        """The engine, ready, and what it is to serve."""
        job, engines, model = self.job, self.engines, self.job.prepared.model
        try:
            if job.kept is not None:
                self.manifest["kept"] = keep_with_run(self.path, job.kept, job.requests)
            if job.capture.scores:
                write_weights(self.path / WEIGHTS_FILE, job.capture.scores)
            todo = _remaining(job, self.path, self.start)
            wanted = (model.path, job.server, self.probe, job.pool, job.prepared.config.replicas)
            shared = engines.serves(*wanted)
            starting = "starting SGLang" if wanted[-1] == 1 else f"starting {wanted[-1]} replicas of SGLang"
            with self.reporter.stage(f"{job.name}: {'changing the policy' if shared else starting}"):
                engine = engines.open(*wanted)
            self.manifest.update(engine.in_force())
        except BaseException as e:
            with closing(str(self.path)):
                engines.stop()
                if not self.start.number:
                    directory.discard_directory(self.path)
            if isinstance(e, ValueError | TypeError):  # SGLang refuses an argument
                raise ConfigError(f"SGLang refuses the server arguments: {e}") from e
            raise
        return engine, todo

    async def _serve(self, engine: ProbedEngine | Replicas, todo: Sequence[Todo], counter: Counter) -> None:
        concurrency = self.job.prepared.config.concurrency if self.job.arm.partners is None else None
        if self.serving is not None:
            assert not isinstance(engine, Replicas)
            answers = self.serving(engine)
        else:
            answers = engine.serve_groups(todo, concurrency, order=self.job.order)
        began, ended = time.perf_counter(), set()
        async for answer in answers:
            self._note_restarts(engine, time.perf_counter() - began)
            rid = asked_rid(answer.rid)
            new = rid not in ended  # what an engine that ended had not made durable is answered again
            ended.add(rid)
            if isinstance(answer, Refusal):
                self.refused[rid] = answer.message
                tokens = 0
            else:
                self.answers.append(answer)
                tokens = len(answer.output_ids)
            if new or self.serving is not None:
                counter.advance(tokens)

    def _note_restarts(self, engine: ProbedEngine | Replicas, seconds: float) -> None:
        self.again += [(seconds, len(self.answers))] * (engine.restarts - len(self.again))

    def _why(self, error: BaseException) -> str:
        """What the manifest says of it."""
        if isinstance(error, EngineDied):
            named = ", ".join(map(asked_rid, error.in_flight[:8])) or "none"
            more = f" and {len(error.in_flight) - 8} more" if len(error.in_flight) > 8 else ""
            return f"{error.message}; requests in flight: {named}{more}"
        if isinstance(error, ProbeError):
            return error.message
        if isinstance(error, KeyboardInterrupt):
            return str(error) or "ended by Ctrl-C"
        return f"{type(error).__name__}: {error}"

    def _all_refused(self) -> str | None:
        if not self.job.requests or len(self.refused) < len(self.job.requests):
            return None
        rid, message = next(iter(self.refused.items()))
        return f"SGLang refused every request; {rid}: {message}"

    def _close(self, fault: str | None, in_flight: Sequence[str] = ()) -> None:
        """Write `requests.parquet` and the final manifest, and say why a run is incomplete."""
        job, path = self.job, self.path
        ranks = range(job.prepared.config.replicas)
        fault = fault or next(filter(None, (fault_of(path, rank) for rank in ranks)), None)
        # First of all, before anything that needs more room or more time.
        self.manifest.update(status="incomplete", **self._told(fault, in_flight))
        if self.serving is not None:
            self.manifest.update(digests(job.requests))
        journal.discard_leftovers(path)
        (path / ENGINE_FILE).unlink(missing_ok=True)
        write_manifest(path, self.manifest)
        close_run(job, path, self.manifest, self.answers, self.refused)

    def _told(self, fault: str | None, in_flight: Sequence[str]) -> dict[str, Any]:
        """Manifest fields: why it is incomplete, durations, refusals, and the requests that an engine ended with."""
        served = {asked_rid(a.rid) for a in self.answers} | self.refused.keys()
        suspects = {rid: why for rid, why in self.start.suspects.items() if rid not in served}
        ended = {rid: {"alone": False, "reason": why} for rid, why in suspects.items()}
        for rid in map(asked_rid, in_flight):
            # Alone because it was suspected, not because it happened to be: once is no proof.
            ended[rid] = {"alone": len(in_flight) == 1 and rid in suspects, "reason": fault}
        return {
            "fault": fault,
            "starts": [*self.start.earlier, *self._starts()],
            "refused": self.refused,
            "ended_engine": ended,
        }

    def _starts(self) -> list[dict[str, Any]]:
        """What was served until an engine took the place of another, and from then on."""
        marks = [(0.0, 0), *self.again, (self.seconds, len(self.answers))]
        return [{"seconds": round(b[0] - a[0], 3), "requests": b[1] - a[1]} for a, b in pairwise(marks)]


def close_run(
    job: Job, path: Path, manifest: dict[str, Any], answers: Sequence[Answer], refused: Mapping[str, str]
) -> None:
    """Write `requests.parquet`, the embedding oracle, the final manifest and the seal of a run whose parts are durable.

    Args:
        manifest: its `fault` says why the run is incomplete; the rest is filled in.
        refused: requests that SGLang refused, and why.
    """
    run = load_run(path)
    counts = write_requests(run, job.requests, job.kept, refused)
    rows = run.row_count()
    if rows and EMBED in run.hook_points and (embedding := load_embedding(job.prepared.model.path)) is not None:
        requests = run.requests(interrupted=True)
        ids = chain(*requests["prompt_ids"], *requests["output_ids"].dropna())
        write_oracle(run, embedding, ids, weights=manifest["model"]["weights_sha256"])
    ended = run.engine_requests().drop_duplicates("rid").set_index("rid")
    answered = {asked_rid(rid) for rid in ended.index} | refused.keys()
    disagreements = [
        a.rid for a in answers if a.rid in ended.index and int(ended.at[a.rid, "cached_tokens"]) != a.cached_tokens
    ]
    spans = run.spans()
    lengths = spans["end"] - spans["start"]
    manifest.update(
        status="complete" if manifest["fault"] is None and len(answered) == len(job.requests) else "incomplete",
        requests_by_finish=counts,
        positions_by_status={k: int(v) for k, v in lengths.groupby(spans["status"]).sum().items()},
        positions_by_phase={k: int(v) for k, v in lengths.groupby(spans["phase"]).sum().items()},
        positions_intervened=int(lengths[spans["intervention"].notna()].sum()),
        rows=rows,
        rows_dtype=str(dtype).removeprefix("torch.") if (dtype := run.rows_dtype()) else None,
        rows_dropped=0,
        cached_tokens_disagreements=disagreements,
        facts=run.facts(),
        files=run.recorded_files(),
    )
    seal.close(path, manifest)


def _remaining(job: Job, path: Path, start: directory.Start) -> list[Todo]:
    """Requests still to be served, in submission order: in the arm's groups, or as one.

    Those that were in flight when an engine died come last, alone unless the arm serves groups: so that the others are
    served, and if one of them ends the engine again, it is known which.
    """
    done = directory.served(path) if start.number else set()
    done = {asked_rid(rid) for rid in done} | start.refused.keys()
    requests = list(job.requests)
    if job.arm.partners is not None:
        groups = group(requests, job.arm.partners, job.order_seed)
        groups = sorted(groups, key=lambda g: any(r.rid in start.suspects for r in g))
    else:
        if job.order_seed is not None:
            random.Random(job.order_seed).shuffle(requests)
        groups = [[r for r in requests if r.rid not in start.suspects]]
        groups += [[r] for r in requests if r.rid in start.suspects]
    again = f"~{start.number}" if start.number else ""
    todo = [[(r.rid + again, r.prompt_ids, job.asked(r)) for r in g if r.rid not in done] for g in groups]
    return [t for t in todo if t]


def _fix(error: BaseException | None, fault: str) -> str:
    """What to do about it."""
    if isinstance(error, ProbeError) and error.fix is not None:
        return error.fix
    if any(os.strerror(n) in fault for n in (errno.ENOSPC, errno.EDQUOT)):
        return "make room on the disk, then finish the run with --resume"
    if crashed(fault):
        return RESUME
    if "SGLang refused every request" in fault:
        return "change the requests or the server arguments"
    return "report this; --resume goes on after the last part, which can be trusted"
