"""The runs and dictionaries of a stability study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.prepare import prepare as check
from sglang_probe.harvest.progress import Quiet, Reporter
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.harvested import Harvested, harvested
from sglang_probe.sae.keys import Keyed, KeySchedule, places
from sglang_probe.sae.manifest import facts_of_run, model_of
from sglang_probe.sae.train import NORM_ROWS, norm_scale
from sglang_probe.studies.lessons import Lesson, read_lessons, train_missing
from sglang_probe.studies.sae_stability.config import ORDER, REPEAT, DictionariesOf, Dictionary, SaeStabilityConfig

__all__ = ["prepare", "read", "run"]

ALL_ROWS = Sinks(first_positions=0, norm_multiple=None)
"""Which rows are sinks is decided by the reference, so that keys mean the same in every harvest."""


@dataclass(frozen=True)
class Rows:
    """The rows of all harvests, by the keys of the reference."""

    keys: pd.DataFrame
    """To train on: `rid`, `position`, `segment`, `phase`, `family`."""
    held_out: Harvested
    """Of the reference, never trained on."""
    harvests: Mapping[str, Keyed]
    """By the name of the dictionary; the reference first."""
    held_out_of: Mapping[str, tuple[Keyed, Any]]
    """The rows of other harvests for the held-out keys."""
    reference: Harvested


def prepare(config: SaeStabilityConfig) -> Prepared:
    """Check model, workload and arms, and that SAELens is there; starts no engine.

    Raises:
        ProbeError: as `sglang_probe.harvest.prepare.prepare`.
    """
    return check(config, config.arms)


def run(
    prepared: Prepared,
    config: SaeStabilityConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Run]:
    """Record every arm, and train every dictionary; runs by name. `resume`: as `harvest.experiment.record`.

    Raises:
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked; or it is of something else.
        ConfigError: SAELens is not installed, or the harvests have nothing in common.
        ProbeError: a recording failed.
    """
    from sglang_probe.sae.train import require_sae_lens

    require_sae_lens()
    first = config.reference
    requests = prepared.workload.requests
    specs = [RunSpec(first, requests, config.arms[first])]
    specs.append(RunSpec(repeat_of(config), requests, config.arms[first], outputs_of=first, order_seed=1))
    specs += [RunSpec(n, requests, arm, outputs_of=first) for n, arm in config.arms.items() if n != first]
    reporter = reporter or Quiet()
    found = record(specs, prepared, folder, overwrite=overwrite, resume=resume, reporter=reporter)
    with reporter.stage("reading rows"):
        rows = read_rows(config, found)
    train_missing(
        lessons(config, rows),
        folder,
        recipe=config.recipe,
        latents=config.latents,
        scale=scale_of(rows.harvests[first], len(rows.keys)),
        held_out=rows.held_out.x_ND,
        metadata={"model_name": model_of([found[first]]).get("name"), "hook_name": config.hook_point},
        identity=identity(config, found),
        overwrite=overwrite,
        resume=resume,
        reporter=reporter,
    )
    return found


def read(config: SaeStabilityConfig, folder: Path) -> dict[str, Run]:
    """The runs that are in `folder`, by name.

    Raises:
        RunDirectoryError: one is missing, or a dictionary.
    """
    read_lessons(folder, [name for name, _, _ in wanted(config)])
    return {name: load_run(folder / name) for name in [*config.arms, repeat_of(config)]}


def repeat_of(config: SaeStabilityConfig) -> str:
    """The second run of the reference, its requests in another order."""
    return f"{config.reference}.{REPEAT}"


def wanted(config: SaeStabilityConfig) -> list[tuple[str, str, int]]:
    """Name, kind (reference, `repeat`, `order`, or of `dictionaries`) and seed of every dictionary."""
    kinds = [config.reference, REPEAT, ORDER, *config.compared]
    return [(f"{kind}-seed{seed}", kind, seed) for kind in kinds for seed in config.seeds]


def identity(config: DictionariesOf, runs: Mapping[str, Run]) -> dict[str, Any]:
    """All that decides what is trained."""
    more = {n: d.model_dump() for n, d in config.compared.items()} if isinstance(config, SaeStabilityConfig) else {}
    hashes = {name: facts_of_run(r)["manifest_sha256"] for name, r in runs.items()}
    return {"config": config.trained(), "dictionaries": more, "runs": hashes}


def scale_of(reference: Keyed, keys: int) -> float:
    """`norm_scale` of the reference, which all dictionaries share."""
    at = np.random.default_rng(0).permutation(keys)[:NORM_ROWS]
    return norm_scale([reference.rows(np.sort(at))])


def read_rows(config: SaeStabilityConfig, runs: Mapping[str, Run]) -> Rows:
    """The rows of every harvest, by the keys of the reference.

    Raises:
        ConfigError: too few rows, or one family alone.
    """
    point, first = config.hook_point, config.reference
    reference = harvested([runs[first]], point, weight="traffic", sinks=config.exclude.sinks())
    training, held_out = reference.split(config.held_out)
    if len(training) < config.batch_size:
        raise ConfigError(f"{len(training)} rows to train on are less than a batch", fix="serve more requests")
    keys = training.tokens
    of: dict[str, tuple[str, str]] = {REPEAT: (repeat_of(config), "traffic")}
    of |= {name: (d.of, _weight(d)) for name, d in config.compared.items()}
    harvests = {first: Keyed(training.x_ND, np.arange(len(keys)))}
    held = {first: (Keyed(held_out.x_ND, np.arange(len(held_out))), held_out.tokens)}
    for name, (run, weight) in of.items():
        rows = harvested([runs[run]], point, weight=weight, sinks=ALL_ROWS)
        harvests[name] = Keyed(rows.x_ND, places(keys, rows.tokens))
        held[name] = (Keyed(rows.x_ND, places(held_out.tokens, rows.tokens)), held_out.tokens)
    return Rows(keys, held_out, harvests, held, reference)


def lessons(config: SaeStabilityConfig, rows: Rows) -> list[Lesson]:
    """Every dictionary: all share initialisations, and all but `order` share the schedule of keys."""
    every = list(rows.harvests.values())
    schedules = [KeySchedule.of(len(rows.keys), every, config.order_seed + i) for i in (0, 1)]
    found = []
    for name, kind, seed in wanted(config):
        harvest = rows.harvests[config.reference if kind == ORDER else kind]
        schedule = schedules[kind == ORDER]

        def batch(step: int, harvest: Keyed = harvest, schedule: KeySchedule = schedule) -> Any:
            return schedule.batch(harvest, step, config.batch_size)

        found.append(Lesson(name, batch, seed, {"dictionary": kind, "order_seed": schedule.seed}))
    return found


def _weight(dictionary: Dictionary) -> str:
    return "traffic" if dictionary.rows == "lineage" else "unique"
