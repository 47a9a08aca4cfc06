"""The runs and dictionaries of a study of mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.progress import Quiet, Reporter
from sglang_probe.run.run import Run
from sglang_probe.sae.harvested import harvested, seen_before
from sglang_probe.sae.keys import KEY, Keyed, KeySchedule, mixed, places
from sglang_probe.sae.manifest import facts_of_run, model_of
from sglang_probe.sae.train import require_sae_lens
from sglang_probe.studies.lessons import Lesson, read_lessons, train_missing
from sglang_probe.studies.phase import runs as phase
from sglang_probe.studies.phase.study import DECODED, HUMAN, REFORWARD
from sglang_probe.studies.sae_hybrid.config import SaeHybridConfig
from sglang_probe.studies.sae_stability.runs import scale_of

__all__ = ["prepare", "read", "run"]

ARMS = (HUMAN, DECODED, REFORWARD)
REPEATED = 8
"""Length of the runs of tokens whose repetition is counted."""


@dataclass(frozen=True)
class Rows:
    """Rows of the continuations that all three runs have, by key."""

    keys: pd.DataFrame
    """To train on: `rid`, `position`, `family`."""
    train: Mapping[str, Keyed]
    """By arm."""
    held_out_keys: pd.DataFrame
    held_out: Mapping[str, Keyed]
    left_out: Mapping[str, list[dict[str, Any]]]
    repeated: Mapping[str, float]
    """Share of the rows of each arm whose last 8 tokens, all in the continuation, were seen before in it."""


def prepare(config: SaeHybridConfig) -> Prepared:
    """Check model and texts; starts no engine.

    Raises:
        ProbeError: as `sglang_probe.studies.phase.runs.prepare`.
    """
    return phase.prepare(config.phase)


def run(
    prepared: Prepared,
    config: SaeHybridConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Run]:
    """Record the three runs in one engine, and train every dictionary; runs by name.

    Raises:
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked; or it is of something else.
        ConfigError: SAELens is not installed, or there are too few rows.
        ProbeError: a recording failed.
    """
    require_sae_lens()
    reporter = reporter or Quiet()
    again: Any = {"overwrite": overwrite, "resume": resume, "reporter": reporter}
    found = {kind: runs[0] for kind, runs in phase.run(prepared, config.phase, folder, **again).items()}
    with reporter.stage("reading rows"):
        rows = read_rows(config, found)
    human = rows.held_out[HUMAN]
    train_missing(
        lessons(config, rows),
        folder,
        recipe=config.recipe,
        latents=config.latents,
        scale=scale_of(rows.train[HUMAN], len(rows.keys)),
        held_out=human.rows(np.arange(len(human.at_K))),
        metadata={"model_name": model_of([found[HUMAN]]).get("name"), "hook_name": config.hook_point},
        identity=identity(config, found),
        **again,
    )
    return found


def read(config: SaeHybridConfig, folder: Path) -> dict[str, Run]:
    """The runs that are in `folder`, by name.

    Raises:
        RunDirectoryError: one is missing, or a dictionary.
    """
    read_lessons(folder, [name for name, *_ in wanted(config)])
    return {kind: runs[0] for kind, runs in phase.read(config.phase, folder).items()}


def wanted(config: SaeHybridConfig) -> list[tuple[str, str, float, int]]:
    """Name, source of the share that is not human, share and seed of every dictionary."""
    arms = [(HUMAN, 0.0), *((source, s) for source in (DECODED, REFORWARD) for s in config.shares[1:])]
    return [(f"{source}-{100 * s:g}-seed{seed}", source, s, seed) for source, s in arms for seed in config.seeds]


def identity(config: SaeHybridConfig, runs: Mapping[str, Run]) -> dict[str, Any]:
    """All that decides what is trained."""
    own = {"shares": config.shares, "prompt_tokens": config.prompt_tokens}
    return {
        "config": {**config.trained(), **own},
        "runs": {n: facts_of_run(r)["manifest_sha256"] for n, r in runs.items()},
    }


def read_rows(config: SaeHybridConfig, runs: Mapping[str, Run]) -> Rows:
    """The rows of the continuations.

    Raises:
        ConfigError: too few rows, or one family alone.
    """
    end = config.prompt_tokens + config.continuation_tokens
    where = f"{config.prompt_tokens} <= position < {end}"
    of = {kind: harvested([runs[kind]], config.hook_point, where=where, sinks=config.exclude.sinks()) for kind in ARMS}
    common = of[HUMAN].tokens
    for kind in ARMS[1:]:
        common = common.merge(of[kind].tokens[KEY], on=KEY)
    both = of[HUMAN].only(places(common, of[HUMAN].tokens))
    train, held_out = (x.tokens for x in both.split(config.held_out))
    if len(train) < config.batch_size:
        raise ConfigError(f"{len(train)} rows to train on are less than a batch", fix="more or longer texts")
    found = [{k: Keyed(x.x_ND, places(keys, x.tokens)) for k, x in of.items()} for keys in (train, held_out)]
    left_out = {kind: x.left_out.to_dict("records") for kind, x in of.items()}
    repeated = {kind: float(seen_before(x.tokens, REPEATED).mean()) for kind, x in of.items()}
    return Rows(train, found[0], held_out, found[1], left_out, repeated)


def lessons(config: SaeHybridConfig, rows: Rows) -> list[Lesson]:
    """Every dictionary: one schedule of keys, and nested choices of the keys that are not human text."""
    schedule = KeySchedule.of(len(rows.keys), list(rows.train.values()), config.order_seed)
    found = []
    for name, source, share, seed in wanted(config):
        harvest = mixed(rows.train[HUMAN], rows.train[source], share)

        def batch(step: int, harvest: Keyed = harvest) -> Any:
            return schedule.batch(harvest, step, config.batch_size)

        found.append(Lesson(name, batch, seed, {"source": source, "share": share}))
    return found
