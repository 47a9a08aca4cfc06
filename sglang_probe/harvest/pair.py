"""The paired experiment: arms over the same requests, outputs forced to the first arm's, each arm run twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_probe.errors import RunDirectoryError
from sglang_probe.harvest.config import ExperimentConfig
from sglang_probe.harvest.directory import difference
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.progress import Reporter
from sglang_probe.harvest.session import harvest, manifest_of
from sglang_probe.ledger.run import MANIFEST, Run, load_run

REPEAT = ".repeat"
"""Suffix of the second run of an arm."""


def run_names(config: ExperimentConfig) -> list[tuple[str, str]]:
    """(run, arm) in execution order: A B A' B'. Replicates lie apart, so a drifting machine shows."""
    arms = list(config.arms)
    return [(a, a) for a in arms] + ([(a + REPEAT, a) for a in arms] if config.repeat else [])


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
    for name, arm in run_names(config):
        path = folder / name
        # The replicate submits the same requests in another order: its floor holds what batch composition alone does.
        order = 1 if name != arm else None
        if resume and _complete(path, manifest_of(prepared, path, config.arms[arm], name, reference, order)):
            run = load_run(path)
        else:
            run = harvest(
                prepared,
                path,
                config.arms[arm],
                arm_name=name,
                outputs_of=reference,
                order_seed=order,
                overwrite=overwrite,
                resume=resume and path.exists(),
                reporter=reporter,
            )
        runs[name] = run
        reference = reference or run
    return runs


def _complete(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether `path` holds a complete run of the wanted configuration.

    Raises:
        RunDirectoryError: it holds a complete run of another one.
    """
    if not (path / MANIFEST).exists() or not (run := load_run(path)).complete:
        return False
    if key := difference(run.manifest, wanted):
        raise RunDirectoryError(f"{path} was recorded with another `{key}`", fix="--overwrite runs every arm again")
    return True
