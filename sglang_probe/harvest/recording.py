"""One run: an engine, requests, an arm, a run directory."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from sglang_probe.engine.hooks import inventory
from sglang_probe.engine.hooks.instruments import features
from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.harvest import directory
from sglang_probe.harvest.engine import Answer, fault_of
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.job import Job, manifest_of, probe_config
from sglang_probe.harvest.kept import keep_with_run
from sglang_probe.harvest.progress import Quiet, Reporter
from sglang_probe.policy.partners import group
from sglang_probe.run import journal, seal
from sglang_probe.run.hook_points import EMBED
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.ownership import load_embedding, write_oracle
from sglang_probe.workload.request import asked_rid

Todo = Sequence[tuple[str, Sequence[int], dict[str, Any]]]
"""Requests to serve: rid, prompt, sampling parameters."""


def harvest(
    job: Job,
    path: Path,
    engines: EngineHost,
    *,
    asks: frozenset[str] = frozenset(),
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Run an engine over the requests of a job and write the run directory `path`.

    Args:
        engines: keeps the engine for the next run.
        asks: fields of `Ask` that the engine must honour for later runs, beyond those of this one.
        overwrite, resume: what to do if `path` exists; `resume` finishes what is not complete.

    Raises:
        InventoryError: the installed SGLang was not reviewed for what is asked.
        RunDirectoryError: `path` exists, or cannot be resumed.
        ProbeError: SGLang refused a request, or the recording failed; the directory says `incomplete`, and why.
        KeyboardInterrupt: passed on after the engine ended and the directory was closed as `incomplete`.
    """
    reporter = reporter or Quiet()
    probe = probe_config(job, path, job.asks | asks)
    inventory.require(features(probe))
    manifest, server, model = manifest_of(job, path), job.server, job.prepared.model
    start = directory.open_directory(path, manifest, overwrite=overwrite, resume=resume)
    manifest["starts"] = list(start.earlier)
    if job.kept is not None:
        manifest["kept"] = keep_with_run(path, job.kept, job.requests)
    probe = probe.model_copy(update={"start": start.number})
    try:
        todo = _remaining(job, path, start)
        shared = engines.serves(model.path, server, probe)
        with reporter.stage(f"{job.name}: {'changing the policy' if shared else 'starting SGLang'}"):
            engine = engines.open(model.path, server, probe)
        manifest["server_resolved"] = engine.server_args
    except BaseException as e:
        engines.stop()
        if not start.number:
            directory.restore_set_aside(path)
        if isinstance(e, ValueError | TypeError):  # SGLang refuses an argument
            raise ConfigError(f"SGLang refuses the server arguments: {e}") from e
        raise
    directory.discard_set_aside(path)
    seconds, answers = 0.0, []
    try:
        with reporter.requests(f"{job.name}: requests", sum(map(len, todo))) as counter:
            began = time.perf_counter()

            async def serve() -> None:
                alone = engine.serve(list(chain(*todo)), job.prepared.config.concurrency)
                async for answer in alone if job.arm.partners is None else engine.serve_groups(todo):
                    answers.append(answer)
                    counter.advance(len(answer.output_ids))

            try:
                engine.run(serve())
            finally:
                seconds = time.perf_counter() - began
        engine.close_recording()
    except BaseException:
        engines.stop()  # so that everything it still knows is on disk
        raise
    finally:
        manifest["starts"] = [*start.earlier, {"seconds": round(seconds, 3), "requests": len(answers)}]
        _close(job, path, manifest, answers)
    return load_run(path)


def _remaining(job: Job, path: Path, start: directory.Start) -> list[Todo]:
    """Requests still to be served, in submission order: in the arm's groups, or as one."""
    done = {asked_rid(rid) for rid in directory.served(path)} if start.number else set()
    requests = list(job.requests)
    if job.arm.partners is not None:
        groups = group(requests, job.arm.partners, job.order_seed)
    else:
        if job.order_seed is not None:
            random.Random(job.order_seed).shuffle(requests)
        groups = [requests]
    again = f"~{start.number}" if start.number else ""
    todo = [[(r.rid + again, r.prompt_ids, job.asked(r)) for r in g if r.rid not in done] for g in groups]
    return [t for t in todo if t]


def _close(job: Job, path: Path, manifest: dict[str, Any], answers: list[Answer]) -> None:
    """Write `requests.parquet` and the final manifest, and say why a run is incomplete."""
    run = load_run(path)
    counts = directory.write_requests(run, job.requests, job.kept)
    rows = run.row_count()
    if rows and EMBED in run.hook_points and (embedding := load_embedding(job.prepared.model.path)) is not None:
        requests = run.requests(interrupted=True)
        ids = chain(*requests["prompt_ids"], *requests["output_ids"].dropna())
        write_oracle(run, embedding, ids, weights=manifest["model"]["weights_sha256"])
    ended = run.engine_requests().drop_duplicates("rid").set_index("rid")
    served = {asked_rid(rid) for rid in ended.index}
    fault = fault_of(path)
    disagreements = [
        a.rid for a in answers if a.rid in ended.index and int(ended.at[a.rid, "cached_tokens"]) != a.cached_tokens
    ]
    complete = fault is None and len(served) == len(job.requests)
    spans = run.spans()
    lengths = spans["end"] - spans["start"]
    manifest.update(
        status="complete" if complete else "incomplete",
        fault=fault,
        requests_by_finish=counts,
        positions_by_status={k: int(v) for k, v in lengths.groupby(spans["status"]).sum().items()},
        positions_by_phase={k: int(v) for k, v in lengths.groupby(spans["phase"]).sum().items()},
        rows=rows,
        rows_dtype=str(dtype).removeprefix("torch.") if (dtype := run.rows_dtype()) else None,
        rows_dropped=0,
        cached_tokens_disagreements=disagreements,
        facts=run.facts(),
        files={name: digest for p in run.parts() for name, digest in p.files.items()},
    )
    seal.close(path, manifest)
    if fault is not None:
        raise ProbeError(
            f"the recording of {path} is incomplete: {fault}",
            fix="report this; the run cannot be trusted beyond its last part",
        )
    journal.discard_leftovers(path)
