"""The experiment: arms over the same requests, each run several times, as `plan.py` orders them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_probe.errors import RunDirectoryError
from sglang_probe.harvest.config import ExperimentConfig
from sglang_probe.harvest.directory import difference
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.progress import Reporter
from sglang_probe.harvest.recording import Hooks, bypasses, harvest, manifest_of
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.ab.plan import plan


def run_names(config: ExperimentConfig) -> list[tuple[str, str]]:
    """(run, arm) in execution order."""
    return [(p.name, p.arm) for p in plan(config)]


def run_pair(
    prepared: Prepared,
    config: ExperimentConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Run]:
    """Run every arm; returns runs by name. With `resume`, complete runs are kept and interrupted ones finished.

    Raises:
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked.
        ProbeError: a recording failed.
    """
    runs: dict[str, Run] = {}
    reference: Run | None = None
    # Hooks are chosen when an engine starts, and arms share engines.
    bypass = any(arm.bypass for arm in config.arms.values()) or any(map(bypasses, prepared.workload.requests))
    hooks = Hooks(config.force_outputs, bypass)
    with EngineHost() as host:
        for p in plan(config):
            path, arm = folder / p.name, config.arms[p.arm]
            outputs_of = reference if config.force_outputs else None
            wanted = manifest_of(prepared, path, arm, p.name, outputs_of, p.order_seed)
            run = complete_run(path, wanted) if resume else None
            if run is None:
                run = harvest(
                    prepared,
                    path,
                    arm,
                    arm_name=p.name,
                    outputs_of=outputs_of,
                    order_seed=p.order_seed,
                    overwrite=overwrite,
                    resume=resume and path.exists(),
                    reporter=reporter,
                    host=host,
                    hooks=hooks,
                )
            runs[p.name] = run
            reference = reference or run
    return runs


def complete_run(path: Path, wanted: dict[str, Any]) -> Run | None:
    """The run at `path`, if it is complete and of the wanted configuration; None if it is not complete.

    Raises:
        RunDirectoryError: it is a complete run of another one.
    """
    if not (path / MANIFEST).exists() or not (run := load_run(path)).complete:
        return None
    if key := difference(run.manifest, wanted):
        raise RunDirectoryError(f"{path} was recorded with another `{key}`", fix="--overwrite runs every arm again")
    return run
