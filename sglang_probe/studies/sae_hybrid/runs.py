"""The runs and dictionaries of a study of mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.progress import Quiet, Reporter
from sglang_probe.run.run import Run, load_run
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


def prepare(config: SaeHybridConfig) -> Prepared | dict[str, Run]:
    """Check model and texts, or the runs that are there; starts no engine.

    Raises:
        ProbeError: as `sglang_probe.studies.phase.runs.prepare`, or as `taken`.
    """
    return phase.prepare(config.phase) if config.runs is None else taken(config)


def run(
    prepared: Prepared | dict[str, Run],
    config: SaeHybridConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Run]:
    """Record the three runs in one engine, unless they are there, and train every dictionary; runs by name.

    Raises:
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked; or it is of something else.
        ConfigError: SAELens is not installed, or there are too few rows.
        ProbeError: a recording failed.
    """
    require_sae_lens()
    reporter = reporter or Quiet()
    again: Any = {"overwrite": overwrite, "resume": resume, "reporter": reporter}
    if isinstance(prepared, dict):
        found = prepared
    else:
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
    """The runs that are in `folder`, or that the configuration names, by name.

    Raises:
        RunDirectoryError: one is missing, or a dictionary.
    """
    read_lessons(folder, [name for name, *_ in wanted(config)])
    if config.runs is not None:
        return taken(config)
    return {kind: runs[0] for kind, runs in phase.read(config.phase, folder).items()}


def taken(config: SaeHybridConfig) -> dict[str, Run]:
    """The runs that the configuration names, by name.

    Raises:
        RunDirectoryError: one is missing or incomplete, lacks the hook point or token ids, or they are not of one
            model and the same texts.
        ConfigError: they were not cut as the configuration says.
    """
    assert config.runs is not None
    found = {arm: load_run(config.runs / arm) for arm in ARMS}
    for arm, run in found.items():
        if run.manifest.get("status") != "complete" or config.hook_point not in run.hook_points:
            raise RunDirectoryError(f"{run.path} is not complete, or has no rows of `{config.hook_point}`")
        if run.manifest.get("model") != found[HUMAN].manifest.get("model"):
            raise RunDirectoryError(f"{run.path} is of another model than the run `{HUMAN}` beside it")
        if arm != DECODED and run.manifest.get("dtype") != found[DECODED].manifest.get("dtype"):
            raise RunDirectoryError(f"{run.path} was recorded in another dtype than the run `{DECODED}` beside it")
    _refuse_other_texts({arm: run.requests().set_index("rid") for arm, run in found.items()}, config)
    return found


def _refuse_other_texts(requests: Mapping[str, pd.DataFrame], config: SaeHybridConfig) -> None:
    """Positions are paired by number, so that all three must be of one text up to the prompt, and two of one after."""
    start, end = config.prompt_tokens, config.prompt_tokens + config.continuation_tokens
    human, decoded, again = (requests[arm] for arm in (HUMAN, DECODED, REFORWARD))
    for rid, own in decoded.iterrows():
        where = f"{config.runs}: request {rid}"
        if rid not in human.index or rid not in again.index:
            raise RunDirectoryError(f"{where} is in `{DECODED}` and not in all three runs")
        prompts = [human.loc[rid, "prompt_ids"], own["prompt_ids"], again.loc[rid, "prompt_ids"]]
        if any(p is None for p in prompts):
            raise RunDirectoryError(f"{where} has no token ids", fix="record with privacy level `ids`")
        text, prompt, same = (list(p) for p in prompts)
        whole = [*prompt, *own["output_ids"]]
        # The last token that was sampled never runs through the model, and has no row.
        least = min(len(whole) - 1, len(text), len(same))
        if len(prompt) > start or least < end:
            raise ConfigError(
                f"{where} was recorded with {len(prompt)} prompt tokens and {least - len(prompt)} after them, and the "
                f"YAML says {start} and {end - start}",
                fix="give `prompt_tokens` and `continuation_tokens` of that recording",
            )
        if text[: len(prompt)] != prompt or same[:end] != whole[:end]:
            raise RunDirectoryError(f"{where} is not the same text in all three runs")


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
