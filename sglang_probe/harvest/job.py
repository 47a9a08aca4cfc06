"""One run, with everything that is known of it before an engine starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import ONE_RANK
from sglang_probe.engine.hooks.instruments.kept_sets import check_reviewed
from sglang_probe.engine.platform.environment import accelerator_present, platform_facts
from sglang_probe.errors import ConfigError, ProbeError, UnsupportedError
from sglang_probe.harvest.families import Order
from sglang_probe.harvest.kept import KEPT_FILE, check_backend, check_kept, digest_of_kept
from sglang_probe.harvest.pool import left_open
from sglang_probe.harvest.prepare import Capture, Prepared, capture_of, check_requests, require_certificate
from sglang_probe.harvest.requests_table import workload_columns
from sglang_probe.harvest.steer import check_arms
from sglang_probe.kept_set import KeptFile
from sglang_probe.policy.arm import Arm
from sglang_probe.run.hook_points import engine_module
from sglang_probe.run.manifest import new_manifest, without_secrets
from sglang_probe.run.run import Run
from sglang_probe.run.workload_digest import digest_of_columns
from sglang_probe.steering.config import ScoresConfig, SteerConfig, told
from sglang_probe.steering.scores import told as told_of_scores
from sglang_probe.workload.build import digest_of
from sglang_probe.workload.request import Request


@dataclass(frozen=True)
class Job:
    """A run that can be recorded: `job_of` checked it."""

    prepared: Prepared
    name: str
    requests: Sequence[Request]
    arm: Arm
    hook_points: tuple[str, ...]
    capture: Capture
    forced: dict[int, tuple[int, ...] | None] | None
    """Output tokens that are decoded in place of sampled ones, by number of the request; None for one that SGLang
    refused."""
    forced_from: str | None
    """The run that they come from."""
    kept: KeptFile | None
    order_seed: int | None
    asks: frozenset[str]
    """Fields of `Ask` that its requests, as they are served, may have."""
    slot_truth: Path | None = None
    """Where the engine reports the true owners of its KV slots (`engine/hooks/instruments/slot_truth.py`): for proofs.
    """

    @property
    def server(self) -> dict[str, Any]:
        """The server arguments of its engine."""
        config = self.prepared.config
        return {"dtype": self.arm.dtype or config.dtype, **self.arm.start_args(config.server)}

    @property
    def pool(self) -> int | None:
        """Tokens of the KV pool of its engine, where nobody chose another number; None: somebody did, or an accelerator
        is used. It is no part of `server`, which says what the user asked: what is in force is in the manifest."""
        if accelerator_present() or not left_open(self.server):
            return None
        return self.prepared.pool.tokens(self.requests)

    @property
    def order(self) -> Order:
        """How its requests are sent: `families` where that can change what is reused."""
        reuses = self.arm.cache == "on" and not self.server.get("disable_radix_cache") and self.arm.partners is None
        return self.prepared.config.order if reuses else "as_given"

    def asked(self, request: Request) -> dict[str, Any]:
        """The sampling parameters that a request is served with."""
        system = None
        if self.prepared.config.telemetry is not None:
            system = tuple((s.start, s.end) for s in request.spans if s.name == "system")
        force = None if self.forced is None else self.forced[request.index]
        steer = None if self.arm.steer is None else (*(request.ask.steer or ()), *self.arm.steer)
        return Ask(cache=self.arm.bypass, force=force, system=system, steer=steer).into(request.sampling_params)


def job_of(
    prepared: Prepared,
    name: str,
    requests: Sequence[Request],
    *,
    arm: Arm,
    hook_points: Sequence[str] | None = None,
    outputs_of: Run | None = None,
    kept: KeptFile | None = None,
    order_seed: int | None = None,
) -> Job:
    """Check a run.

    Args:
        hook_points: None: the configuration's.
        outputs_of: a run whose output tokens are forced here, so that both decode the same text.
        kept: the kept sets that requests name.
        order_seed: submit the requests in an order shuffled by this seed; None: in the given order.

    Raises:
        ConfigError: a request asks for what it cannot have, names a kept set that it cannot have, or has another's id.
        UnsupportedError: the hook points cannot be captured, or the engine cannot attend to kept sets.
        WorkloadError: a request does not fit into the context.
        ProbeError: `outputs_of` has no output for a request.
    """
    config = prepared.config
    requests = tuple(requests)
    if requests != prepared.workload.requests:
        check_requests(requests, prepared)
    if len({r.rid for r in requests}) < len(requests) or any("~" in r.rid for r in requests):
        raise ConfigError("the ids of the requests of a run must differ and hold no `~`")
    points = tuple(config.hook_points if hook_points is None else hook_points)
    server = {**config.server, **arm.server}
    capture = capture_of(config, prepared.model, points, [server])
    check_arms({name: arm}, prepared.library)
    check_kept(requests, kept, prepared.model)
    if kept is not None:
        check_reviewed(prepared.model.architecture)
        check_backend(server, simulated=config.simulated_graphs)
        if not prepared.proving:
            require_certificate(config, prepared.model, server, evict=True)
        if config.telemetry is not None:
            raise ConfigError(
                "telemetry is computed from every cached key, and a request with a kept set attends to some of them",
                fix="record it without `telemetry`, or serve it without kept sets",
            )
    forced = None if outputs_of is None else _outputs(outputs_of, requests)
    asks = {field for r in requests for field in r.ask.fields}
    asks |= asks_given(arm, outputs_of, kept)
    asks |= {"system"} if config.telemetry is not None else set()
    if int(server.get("tp_size", 1)) > 1 and (alone := sorted(asks & ONE_RANK)):
        raise UnsupportedError(
            f"`{alone[0]}` with `tp_size: {server['tp_size']}`: one rank alone would do it, and the others would "
            "compute something else",
            fix="set `tp_size: 1`, or `force_outputs: false` where arms are forced",
        )
    return Job(
        prepared=prepared,
        name=name,
        requests=requests,
        arm=arm,
        hook_points=points,
        capture=capture,
        forced=forced,
        forced_from=None if outputs_of is None else outputs_of.manifest["name"],
        kept=kept,
        order_seed=order_seed,
        asks=frozenset(asks),
    )


def asks_given(arm: Arm, outputs_of: object | None, kept: object | None) -> set[str]:
    """Fields of `Ask` that the requests of a run are given, whatever they ask themselves."""
    given = {"force": outputs_of, "cache": arm.bypass, "evict": kept, "steer": arm.steer}
    return {field for field, value in given.items() if value is not None}


def _outputs(run: Run, requests: Sequence[Request]) -> dict[int, tuple[int, ...] | None]:
    found = {
        r.index: None if r.output_ids is None else tuple(r.output_ids.tolist()) for r in run.requests().itertuples()
    }
    if (absent := next((r for r in requests if r.index not in found), None)) is not None:
        raise ProbeError(f"{run.path} has no output for {absent.where}", fix="finish it with --resume first")
    return {r.index: found[r.index] for r in requests}


def probe_config(job: Job, path: Path, asks: frozenset[str]) -> EngineProbeConfig:
    """What the engine's processes are told.

    Args:
        asks: fields of `Ask` that the engine must honour, for this run and for those that share it.
    """
    config = job.prepared.config
    return EngineProbeConfig(
        run=path.resolve(),
        hook_points=list(job.hook_points),
        certificate=config.certificate if config.certificate == "auto" else Path(config.certificate).resolve(),
        proving=job.prepared.proving,
        simulated_graphs=config.simulated_graphs,
        rows=config.rows,
        scores=_scores(job),
        telemetry=config.telemetry,
        asks=sorted(asks | ({"steer"} if job.prepared.config.steer is not None else set())),
        kept=None if job.kept is None else path.resolve() / KEPT_FILE,
        steer=_steer(job),
        switches=job.arm.switches(config.server),
        checkpoint_seconds=config.checkpoint_seconds,
        slot_truth=job.slot_truth,
        ignore_interrupt=True,
    )


def _scores(job: Job) -> ScoresConfig | None:
    config, capture = job.prepared.config.scores, job.capture
    if config is None or not capture.scores:
        return None
    return config.model_copy(update={"library": config.library.resolve(), "hash": capture.scores_library})


def _steer(job: Job) -> SteerConfig | None:
    config, library = job.prepared.config.steer, job.prepared.library
    if config is None or library is None:
        return None
    return config.model_copy(update={"library": config.library.resolve(), "hash": library.hash})


def manifest_of(job: Job, path: Path) -> dict[str, Any]:
    """What is known of a run before it starts."""
    prepared, arm = job.prepared, job.arm
    config, model = prepared.config, prepared.model
    return new_manifest(
        name=path.name,
        arm=job.name,
        policy=arm.model_dump(mode="json", exclude=None if arm.steer else {"steer"}),
        model=model.identity,
        model_path=model.path,
        model_config=model.config,
        dtype=arm.dtype or config.dtype,
        hook_points={h: engine_module(h) for h in job.hook_points},
        rows_kept=config.rows.model_dump(mode="json"),
        telemetry=None if config.telemetry is None else config.telemetry.model_dump(mode="json"),
        telemetry_layers=job.capture.telemetry_layers,
        heads=job.capture.heads,
        head_numbers=job.capture.head_numbers,
        scores=told_of_scores(job.capture.scores),
        workload=dict(prepared.workload.source),
        **digests(job.requests),
        corpus_digest=prepared.workload.corpus_digest,
        sampling=config.sampling,
        concurrency=config.concurrency,
        submission_order=job.order_seed,
        order=job.order,
        server_given=without_secrets(job.server),
        switches=arm.switches(config.server).model_dump(mode="json", exclude_none=True),
        partners=None if arm.partners is None else arm.partners.model_dump(mode="json"),
        forced_from=job.forced_from,
        forced_digest=None if job.forced is None else _digest(sorted(job.forced.items())),
        steer=None if config.steer is None or prepared.library is None else told(config.steer, prepared.library),
        kept_digest=None if job.kept is None else digest_of_kept(job.kept, job.requests),
        platform=platform_facts(),
        inventory={"sglang": prepared.inventory.sglang, "version": prepared.inventory.version},
        requests_expected=len(job.requests),
        lines_skipped=prepared.workload.skipped,
        skipped_by_reason=dict(prepared.workload.reasons),
        skipped_first=dict(prepared.workload.examples),
        prompts_made_from=dict(prepared.workload.made_from),
        privacy="ids",
    )


def digests(requests: Sequence[Request]) -> dict[str, str]:
    """Manifest fields that say which requests a run is of."""
    ordered = sorted(requests, key=lambda r: r.index)
    return {
        "workload_digest": digest_of(requests),
        "columns_digest": digest_of_columns(workload_columns(r) for r in ordered),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
