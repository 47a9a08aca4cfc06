"""Several runs from one preparation, in one loop: engines are shared, and what is there already is kept or refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from sglang_probe.errors import ConfigError
from sglang_probe.harvest import directory
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.job import Job, asks_given, job_of, manifest_of
from sglang_probe.harvest.prepare import Prepared, capture_of, check_requests
from sglang_probe.harvest.progress import Reporter
from sglang_probe.harvest.recording import harvest
from sglang_probe.kept_set import KeptFile
from sglang_probe.policy.arm import Arm
from sglang_probe.run.run import Run
from sglang_probe.workload.request import Request

Runs = Mapping[str, Run]
"""The runs recorded so far, by name."""


_AS_SGLANG_DOES = Arm()


@dataclass(frozen=True)
class RunSpec:
    """One run: what is served, how, and what is captured."""

    name: str
    """Of the run directory."""
    requests: Sequence[Request] | Callable[[Runs], Sequence[Request]]
    """Or what makes them of the runs recorded so far."""
    arm: Arm = _AS_SGLANG_DOES
    hook_points: Sequence[str] | None = None
    """None: the configuration's."""
    outputs_of: str | None = None
    """Name of an earlier run whose output tokens are forced here, so that both decode the same text."""
    kept: Path | KeptFile | Callable[[Runs], Path | KeptFile] | None = None
    """The kept sets that the requests name, or what makes them of the runs recorded so far."""
    order_seed: int | None = None
    """Submit the requests in an order shuffled by this seed; None: in the given order."""


def record(
    specs: Sequence[RunSpec],
    prepared: Prepared,
    folder: Path,
    *,
    asks: Collection[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
    host: EngineHost | None = None,
) -> dict[str, Run]:
    """Record runs, in order, each in the directory of its name in `folder`.

    An engine serves all runs that need the same one and follow each other. With `resume`, a complete run is kept if the
    manifest that would be written equals the one that is there (`directory.CONFIGURATION`: requests, forced outputs and
    kept sets included), and an interrupted one is finished; a run of something else is refused.

    Args:
        asks: fields of `Ask` that the engines must honour for later runs, beyond those that `specs` show (forced
            outputs, how the cache is used, kept sets): what an engine can do is settled when it starts.
        host: keeps the engine for what is recorded next; None: engines for these runs alone.

    Raises:
        ConfigError: two specs have one name; `outputs_of` names no earlier one; or as `job_of`. What can be refused
            before the first run is recorded is refused then.
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked; or it is one of something else.
        ProbeError: a recording failed.
    """
    _check_names(specs)
    _check_given(specs, prepared)
    directory.refuse_both(overwrite=overwrite, resume=resume)
    if not (overwrite or resume):
        for spec in specs:
            directory.refuse_existing(folder / spec.name)
    asks = {*asks, *(field for spec in specs for field in asks_given(spec.arm, spec.outputs_of, spec.kept))}
    runs: dict[str, Run] = {}
    with nullcontext(host) if host is not None else EngineHost() as engines:
        for spec in specs:
            job, path = resolve(spec, prepared, runs), folder / spec.name
            runs[spec.name] = record_job(
                job, path, engines, asks=asks, overwrite=overwrite, resume=resume, reporter=reporter
            )
    return runs


def record_job(
    job: Job,
    path: Path,
    engines: EngineHost,
    *,
    asks: Collection[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """One run of `record`: kept, finished, or recorded.

    Raises:
        ProbeError: as `record`.
    """
    if resume and (run := directory.complete_run(path, manifest_of(job, path))) is not None:
        return run
    return harvest(job, path, engines, asks=frozenset(asks), overwrite=overwrite, resume=resume, reporter=reporter)


def resolve(spec: RunSpec, prepared: Prepared, runs: Runs) -> Job:
    """The job that a spec means, once the runs that it depends on are there.

    Raises:
        ProbeError: as `job_of`.
    """
    requests = spec.requests(runs) if callable(spec.requests) else spec.requests
    # A KeptFile is no function.
    kept = spec.kept(runs) if callable(spec.kept) else spec.kept
    return job_of(
        prepared,
        spec.name,
        requests,
        arm=spec.arm,
        hook_points=spec.hook_points,
        outputs_of=None if spec.outputs_of is None else runs[spec.outputs_of],
        kept=KeptFile(kept) if isinstance(kept, Path) else kept,
        order_seed=spec.order_seed,
    )


def _check_given(specs: Sequence[RunSpec], prepared: Prepared) -> None:
    """Refuse what of later runs can be refused before the first one is recorded: their requests, where they are given,
    and what is captured."""
    checked: list[Sequence[Request]] = [prepared.workload.requests]
    for spec in specs:
        if not callable(spec.requests) and not any(spec.requests is done for done in checked):
            check_requests(spec.requests, prepared)
            checked.append(spec.requests)
        if spec.hook_points is not None:
            server = {**prepared.config.server, **spec.arm.server}
            capture_of(prepared.config, prepared.model, spec.hook_points, [server])


def _check_names(specs: Sequence[RunSpec]) -> None:
    earlier: set[str] = set()
    for spec in specs:
        if spec.name in earlier:
            raise ConfigError(f"two runs are named `{spec.name}`")
        if spec.outputs_of is not None and spec.outputs_of not in earlier:
            raise ConfigError(f"run `{spec.name}`: `outputs_of: {spec.outputs_of}` is no earlier run")
        earlier.add(spec.name)
