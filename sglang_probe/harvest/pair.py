"""The paired experiment: arms over the same requests, outputs forced to the first arm's, each arm run twice."""

from __future__ import annotations

from pathlib import Path

from sglang_probe.harvest.config import ExperimentConfig
from sglang_probe.harvest.progress import Reporter
from sglang_probe.harvest.session import Prepared, harvest
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
        if resume and _complete(path, prepared):
            run = load_run(path)
        else:
            run = harvest(
                prepared,
                path,
                config.arms[arm],
                arm_name=name,
                outputs_of=reference,
                overwrite=overwrite,
                resume=resume and path.exists(),
                reporter=reporter,
            )
        runs[name] = run
        reference = reference or run
    return runs


def _complete(path: Path, prepared: Prepared) -> bool:
    if not (path / MANIFEST).exists():
        return False
    run = load_run(path)
    return run.complete and run.manifest["workload_digest"] == prepared.workload.digest
