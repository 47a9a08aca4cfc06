"""The plan of an experiment: which arm runs when, and for which runs SGLang must be started."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from sglang_probe.policy.arm import Arm
from sglang_probe.studies.ab.config import AbConfig

REPEAT = ".repeat"
"""Suffix of the second run of an arm; of the third `.repeat2`, and so on."""

START_SECONDS = 20
"""About how long SGLang takes to start on the CPU reference platform with a warm bytecode cache."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of one arm."""

    name: str
    arm: str
    replicate: int
    starts_engine: bool
    """Whether SGLang is started for it; else the policy is changed in the engine that is running."""

    @property
    def order_seed(self) -> int | None:
        """Of the submission order. The first replicate runs in workload order."""
        return self.replicate or None


def plan(config: AbConfig) -> list[PlannedRun]:
    """Runs in execution order.

    The first arm runs first, because the others are forced to its outputs. After it, arms run in an order drawn anew
    for each replicate, so that a drifting machine is not taken for a policy; arms that can share an engine stay
    together, and a replicate begins with those that the running engine can serve.
    """
    rng = random.Random(config.order_seed)
    names = list(config.arms)
    runs: list[PlannedRun] = []
    running: Any = None
    for replicate in range(config.replicates):
        groups: dict[str, list[str]] = {}
        for name in rng.sample(names, len(names)):
            groups.setdefault(_engine(config, config.arms[name]), []).append(name)
        order = rng.sample(list(groups), len(groups))
        if replicate == 0:
            reference = names[0]
            running = _engine(config, config.arms[reference])
            groups[running].remove(reference)
            groups[running].insert(0, reference)
        order.sort(key=lambda key: key != running)
        for key in order:
            for name in groups[key]:
                suffix = "" if replicate == 0 else REPEAT + (str(replicate) if replicate > 1 else "")
                runs.append(PlannedRun(name + suffix, name, replicate, not runs or key != running))
                running = key
    return runs


def run_names(config: AbConfig) -> list[tuple[str, str]]:
    """(run, arm) in execution order."""
    return [(p.name, p.arm) for p in plan(config)]


def _engine(config: AbConfig, arm: Arm) -> str:
    """What identifies the engine that an arm needs."""
    args = {"dtype": arm.dtype or config.dtype, **arm.start_args(config.server)}
    return repr(sorted(args.items(), key=str))
