"""The runs of an experiment: arms over the same requests, each several times, in the order of `plan.py`."""

from __future__ import annotations

from pathlib import Path

from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.prepare import prepare as check
from sglang_probe.harvest.progress import Reporter
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.ab.config import AbConfig
from sglang_probe.studies.ab.plan import plan

__all__ = ["prepare", "read", "run"]


def prepare(config: AbConfig) -> Prepared:
    """Check model, workload and arms; starts no engine.

    Raises:
        ProbeError: as `sglang_probe.harvest.prepare.prepare`.
    """
    return check(config, config.arms)


def run(
    prepared: Prepared,
    config: AbConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Run]:
    """Record every arm; runs by name. `resume`: as `sglang_probe.harvest.experiment.record`.

    Raises:
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked; or it is of something else.
        ProbeError: a recording failed.
    """
    planned = plan(config)
    first = planned[0].name
    specs = [
        RunSpec(
            p.name,
            prepared.workload.requests,
            config.arms[p.arm],
            outputs_of=first if config.force_outputs and p.name != first else None,
            order_seed=p.order_seed,
        )
        for p in planned
    ]
    return record(specs, prepared, folder, overwrite=overwrite, resume=resume, reporter=reporter)


def read(config: AbConfig, folder: Path) -> dict[str, Run]:
    """The runs that are in `folder`, by name.

    Raises:
        RunDirectoryError: one is missing.
    """
    return {p.name: load_run(folder / p.name) for p in plan(config)}
