"""One harvest: an engine, a workload, an arm, a run directory."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sglang_probe.engine.hooks import inventory
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import features
from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.harvest import directory
from sglang_probe.harvest.engine import Answer, fault_of
from sglang_probe.harvest.host import EngineHost, engine_key
from sglang_probe.harvest.kept import KEPT_FILE, check_backend, check_kept, keep_with_run
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.progress import Quiet, Reporter
from sglang_probe.kept_set import KeptFile
from sglang_probe.policy.arm import Arm
from sglang_probe.policy.partners import group
from sglang_probe.policy.positions import override_of
from sglang_probe.run import journal
from sglang_probe.run.hook_points import EMBED, engine_module
from sglang_probe.run.manifest import new_manifest, write_manifest
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.ownership import load_embedding, write_oracle
from sglang_probe.workload.request import Request

Todo = list[tuple[str, Sequence[int], dict[str, Any]]]
"""Requests to serve: rid, prompt, sampling parameters."""


@dataclass(frozen=True)
class Hooks:
    """What the hooks of an engine can do for the recordings that share it."""

    forced_outputs: bool = False
    bypass: bool = False
    positions: bool = False
    evictions: bool = False


def harvest(
    prepared: Prepared,
    path: Path,
    arm: Arm,
    *,
    arm_name: str = "harvest",
    outputs_of: Run | None = None,
    order_seed: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
    host: EngineHost | None = None,
    hooks: Hooks = Hooks(),
    kept: KeptFile | None = None,
) -> Run:
    """Run an engine over the workload under `arm` and write the run directory `path`.

    Args:
        outputs_of: a run whose output tokens are forced here, so that both decode the same text.
        order_seed: submit the requests in an order shuffled by this seed; None: in workload order.
        overwrite, resume: what to do if `path` exists.
        host: keeps the engine for the next recording; None: an engine for this one alone.
        hooks: what a shared engine must be able to do, beyond what this recording needs.
        kept: the kept sets that requests may name (`sglang_probe.harvest.kept_requests`).

    Raises:
        ConfigError: a request names a kept set that it cannot have.
        InventoryError: the installed SGLang was not reviewed for what a request or the hooks need.
        RunDirectoryError: `path` exists, or cannot be resumed.
        ProbeError: SGLang refused a request, or the recording failed; the directory says `incomplete`, and why.
        KeyboardInterrupt: passed on after the engine ended and the directory was closed as `incomplete`.
    """
    reporter = reporter or Quiet()
    engines = host or EngineHost()
    manifest = manifest_of(prepared, path, arm, arm_name, outputs_of, order_seed)
    requests = prepared.workload.requests
    check_kept(requests, kept, prepared.model)
    if kept is not None:
        check_backend(manifest["server_given"])
        if prepared.config.telemetry is not None:
            raise ConfigError(
                "telemetry is computed from every cached key, and a request with a kept set attends to some of them",
                fix="record it without `telemetry`, or serve it without kept sets",
            )
    probe = EngineProbeConfig(
        run=path.resolve(),
        hook_points=prepared.config.hook_points,
        accelerator=prepared.config.accelerator,
        rows=prepared.config.rows,
        telemetry=prepared.config.telemetry,
        asks=[
            *(["force"] if hooks.forced_outputs or outputs_of is not None or any(map(forces, requests)) else []),
            *(["cache"] if hooks.bypass or arm.bypass is not None or any(map(bypasses, requests)) else []),
            *(["positions"] if hooks.positions or any(map(moves, requests)) else []),
            *(["evict"] if hooks.evictions or kept is not None else []),
        ],
        kept=None if kept is None else path.resolve() / KEPT_FILE,
        switches=arm.switches(prepared.config.server),
        checkpoint_seconds=prepared.config.checkpoint_seconds,
        ignore_interrupt=True,
    )
    inventory.require(features(probe))
    start = directory.open_directory(path, manifest, overwrite=overwrite, resume=resume)
    manifest["sessions"] = list(start.sessions)
    if kept is not None:
        manifest["kept"] = keep_with_run(path, kept, requests)
    probe = probe.model_copy(update={"session": start.session})
    server = manifest["server_given"]
    try:
        todo = _remaining(prepared, path, start, arm, outputs_of, order_seed)
        shared = engines.serves(engine_key(prepared.model.path, server, probe))
        with reporter.stage(f"{arm_name}: {'changing the policy' if shared else 'starting SGLang'}"):
            engine = engines.open(prepared.model.path, server, probe)
        manifest["server_resolved"] = engine.server_args
    except BaseException as e:
        engines.stop()
        if not start.session:
            directory.restore_set_aside(path)
        if isinstance(e, ValueError | TypeError):  # SGLang refuses an argument
            raise ConfigError(f"SGLang refuses the server arguments: {e}") from e
        raise
    directory.discard_set_aside(path)
    seconds, answers = 0.0, []
    try:
        with reporter.requests(f"{arm_name}: requests", sum(map(len, todo))) as counter:
            began = time.perf_counter()

            async def serve() -> None:
                alone = engine.serve(list(chain(*todo)), prepared.config.concurrency)
                async for answer in alone if arm.partners is None else engine.serve_groups(todo):
                    answers.append(answer)
                    counter.advance(len(answer.output_ids))

            try:
                engine.run(serve())
            finally:
                seconds = time.perf_counter() - began
        engine.close_recording()
        if host is None:
            engines.stop()
    except BaseException:
        engines.stop()  # so that everything it still knows is on disk
        raise
    finally:
        manifest["sessions"] = [*start.sessions, {"seconds": round(seconds, 3), "requests": len(answers)}]
        _close(path, manifest, prepared, answers, kept)
    return load_run(path)


def bypasses(request: Request) -> bool:
    """Whether a request says itself how it uses the cache."""
    return "cache" in _own(request)


def forces(request: Request) -> bool:
    """Whether a request prescribes output tokens itself."""
    return "force" in _own(request)


def _own(request: Request) -> dict[str, Any]:
    return (request.sampling_params.get("custom_params") or {}).get("probe") or {}


def moves(request: Request) -> bool:
    """Whether a request says itself by which positions it is rotated."""
    return override_of(request.sampling_params.get("custom_params")) is not None


def manifest_of(
    prepared: Prepared, path: Path, arm: Arm, arm_name: str, outputs_of: Run | None, order_seed: int | None
) -> dict[str, Any]:
    """What is known of a run before it starts."""
    config, model = prepared.config, prepared.model
    return new_manifest(
        name=path.name,
        arm=arm_name,
        policy=arm.model_dump(mode="json"),
        model=model.identity(),
        model_path=model.path,
        model_config=model.config,
        dtype=arm.dtype or config.dtype,
        hook_points={h: engine_module(h) for h in config.hook_points},
        rows_kept=config.rows.model_dump(mode="json"),
        telemetry=None if config.telemetry is None else config.telemetry.model_dump(mode="json"),
        telemetry_layers=prepared.telemetry_layers,
        heads=prepared.heads,
        head_numbers=prepared.head_numbers,
        workload=prepared.workload_source,
        workload_digest=prepared.workload.digest,
        corpus_digest=prepared.workload.corpus_digest,
        sampling=config.sampling,
        concurrency=config.concurrency,
        submission_order=order_seed,
        server_given={"dtype": arm.dtype or config.dtype, **arm.start_args(config.server)},
        switches=arm.switches(config.server).model_dump(mode="json", exclude_none=True),
        partners=None if arm.partners is None else arm.partners.model_dump(mode="json"),
        forced_from=None if outputs_of is None else outputs_of.manifest["name"],
        inventory={"sglang": prepared.inventory.sglang, "version": prepared.inventory.version},
        requests_expected=len(prepared.workload.requests),
        lines_skipped=prepared.workload.skipped,
        privacy="ids",
    )


def _remaining(
    prepared: Prepared, path: Path, start: directory.Start, arm: Arm, outputs_of: Run | None, order_seed: int | None
) -> list[Todo]:
    """Requests still to be served, in submission order: in the arm's groups, or as one."""
    forced: dict[int, list[int]] = {}
    if outputs_of is not None:
        forced = {r.index: r.output_ids.tolist() for r in outputs_of.requests().itertuples()}
    done = {rid.split("~")[0] for rid in directory.served(path)} if start.session else set()
    requests = list(prepared.workload.requests)
    if arm.partners is not None:
        groups = group(requests, arm.partners, order_seed)
    else:
        if order_seed is not None:
            random.Random(order_seed).shuffle(requests)
        groups = [requests]

    def ask(r: Request) -> tuple[str, Sequence[int], dict[str, Any]]:
        params = dict(r.sampling_params)
        probe: dict[str, Any] = {} if arm.bypass is None else {"cache": arm.bypass}
        if outputs_of is not None:
            if r.index not in forced:
                raise ProbeError(
                    f"{outputs_of.path} has no output for request {r.index}", fix="finish it with --resume first"
                )
            probe["force"] = forced[r.index]
        if prepared.config.telemetry is not None:
            probe["system"] = [[s.start, s.end] for s in r.spans if s.name == "system"]
        if probe:
            own = params.get("custom_params") or {}
            params["custom_params"] = {**own, "probe": {**own.get("probe", {}), **probe}}
        return f"{r.rid}~{start.session}" if start.session else r.rid, r.prompt_ids, params

    todo = [[ask(r) for r in g if r.rid not in done] for g in groups]
    return [t for t in todo if t]


def _close(
    path: Path, manifest: dict[str, Any], prepared: Prepared, answers: list[Answer], kept: KeptFile | None
) -> None:
    """Write `requests.parquet` and the final manifest, and say why a run is incomplete."""
    run = load_run(path)
    counts = directory.write_requests(run, prepared.workload.requests, kept)
    rows = run.row_count()
    if rows and EMBED in run.hook_points and (embedding := load_embedding(prepared.model.path)) is not None:
        requests = run.requests(interrupted=True)
        write_oracle(run, embedding, chain(*requests["prompt_ids"], *requests["output_ids"].dropna()))
    ended = run.engine_requests().drop_duplicates("rid").set_index("rid")
    served = {rid.split("~")[0] for rid in ended.index}
    fault = fault_of(path)
    disagreements = [
        a.rid for a in answers if a.rid in ended.index and int(ended.at[a.rid, "cached_tokens"]) != a.cached_tokens
    ]
    complete = fault is None and len(served) == len(prepared.workload.requests)
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
        files={name: digest for p in run.parts() for name, digest in p.files.items()},
    )
    write_manifest(path, manifest)
    if fault is not None:
        raise ProbeError(
            f"the recording of {path} is incomplete: {fault}",
            fix="report this; the run cannot be trusted beyond its last part",
        )
    journal.discard_leftovers(path)
