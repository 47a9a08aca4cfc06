"""From runs to dictionaries: read the rows, train each dictionary that is not there yet, judge what is stored.

Folder of a training: `training.json` (what it is of), a folder for each dictionary (`cfg.json`, `sae_weights`, and
`result.json` once it is judged), `report.html`, `summary.json`, `tables/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from sglang_probe.axes.position import bins_of
from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.run import journal
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae.evaluation import evaluate, variance_of
from sglang_probe.sae.folder import read_sae, weights_sha256, write_sae
from sglang_probe.sae.harvested import Harvested, Listed, listed
from sglang_probe.sae.manifest import KEY, facts_of_run, manifest_from, model_of
from sglang_probe.sae.schedule import Schedule, schedule
from sglang_probe.sae.shelf import Shelf
from sglang_probe.sae.threshold import shared_threshold, threshold_for
from sglang_probe.sae.train import CHECKPOINT, NORM_ROWS, Task, Trained, norm_scale, require_sae_lens, train
from sglang_probe.studies.base import Measured, plain
from sglang_probe.studies.sae_train import checkpoint
from sglang_probe.studies.sae_train.config import SaeTrainConfig

TRAINING, RESULT = "training.json", "result.json"
SERVED = "served.json"
"""How many rows a training had that were not kept."""
CALIBRATION_ROWS, CURVE_ROWS, LEAST_HELD_OUT = 8192, 2048, 5
Tell = Callable[[dict[str, float]], None]
Rows = TypeVar("Rows", Harvested, Listed)


@dataclass(frozen=True)
class Prepared:
    """Rows that were chosen and split."""

    runs: Sequence[Run]
    train: Listed
    held_out: Harvested
    order: Schedule
    scale: float
    identity: dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What dictionaries were trained on and are judged by, for what is written of them."""

    held_out: Harvested
    scale: float
    identity: Mapping[str, Any]
    model: Mapping[str, Any]
    facts: Sequence[Mapping[str, Any]]
    """Of each run, `facts_of_run`."""
    left_out: Harvested | Listed
    """Harvest whose exclusions are told."""
    variance: float
    """Of the rows that were trained on."""
    epoch: int
    """Rows of one pass."""


@dataclass(frozen=True)
class TrainResult(Measured):
    """Every dictionary of a training."""

    name: str
    identity: Mapping[str, Any]
    dictionaries: pd.DataFrame
    """A row each: `dictionary`, `latents`, `seed`, and the numbers of its evaluation."""
    groups: pd.DataFrame
    curve: pd.DataFrame
    left_out: pd.DataFrame

    def to_json(self) -> dict[str, Any]:
        """What was trained on what, and how good it is."""
        return {
            "name": self.name,
            "of": dict(self.identity),
            "dictionaries": self.dictionaries.to_dict("records"),
            "left_out": self.left_out.to_dict("records"),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """All of it."""
        names = ("dictionaries", "groups", "curve", "left_out")
        return {name: getattr(self, name) for name in names}


def dictionary_name(config: SaeTrainConfig, latents: int, seed: int) -> str:
    """Folder of one dictionary."""
    return f"{config.architecture}-{latents}-seed{seed}"


def wanted(config: SaeTrainConfig) -> list[tuple[str, int, int]]:
    """Name, latents and seed of every dictionary."""
    return [(dictionary_name(config, m, s), m, s) for m in config.latents for s in config.seeds]


def prepare(config: SaeTrainConfig, name: str) -> Prepared:
    """Choose the rows, split them, and read those to judge by.

    Raises:
        ConfigError, RunDirectoryError: they cannot be read, or are too few.
    """
    runs, others = [load_run(p) for p in config.runs], [load_run(p) for p in config.evaluate_on]
    how: dict[str, Any] = {"sinks": config.exclude.sinks(), "deduplicate": config.deduplicate}
    rows = listed(runs, config.hook_point, where=config.where, weight=config.weight, **how)
    if others:
        training, judged = rows, listed(others, config.hook_point, where=config.where, **how)
    else:
        training, judged = rows.split(config.held_out)
    if config.most_rows is not None:
        training = training.at_most(config.most_rows)
    held_out = sampled(judged, config.evaluation_rows).loaded()
    if len(held_out) < LEAST_HELD_OUT or len(training) < config.batch_size:
        raise ConfigError(
            f"{len(training)} rows to train on and {len(held_out)} to judge by are too few",
            fix="give more runs, or a smaller `batch_size`",
        )
    capacity = max((config.buffer_mib << 20) // training.row_bytes, config.batch_size)
    together = None if len(training) <= capacity else capacity
    mix = None if config.mix is None else {str(k): v for k, v in config.mix.items()}
    order = schedule(training, mix, config.order_seed, together)
    if order.epoch_length < 1:
        raise ConfigError("the shares of `mix` leave no rows", fix="give the scarce phase a smaller share")
    first = order.batch(0, min(NORM_ROWS, order.epoch_length))
    scale = norm_scale(training.batches(first))
    identity: dict[str, Any] = {
        "config": config.identity(),
        "weight": config.weight if isinstance(config.weight, str) else journal.sha256(config.weight),
        "runs": [facts_of_run(r)["manifest_sha256"] for r in runs],
        "evaluate_on": [facts_of_run(r)["manifest_sha256"] for r in others],
        "model": model_of(runs).get("name"),
        "hook_point": config.hook_point,
        "rows": {"train": len(training), "held_out": len(held_out), "epoch": order.epoch_length},
    }
    if together is not None:
        identity["rows"]["shuffled_together"] = together
    return Prepared([*runs, *others], training, held_out, order, scale, plain(identity))


def open_folder(folder: Path, identity: dict[str, Any], *, overwrite: bool, resume: bool) -> None:
    """Make the folder of a training.

    Raises:
        RunDirectoryError: it is there and nothing was asked of it, holds something else, or is another training.
    """
    identity = {**identity, "versions": {"sae-lens": require_sae_lens(), "torch": torch.__version__}}
    path = folder / TRAINING
    if folder.exists() and any(folder.iterdir()) and not path.exists():
        raise RunDirectoryError(f"{folder} exists and holds no training", fix="choose another output")
    if path.exists() and not (overwrite or resume):
        raise RunDirectoryError(
            f"{folder} exists already", fix="--resume trains what is missing, --overwrite trains everything again"
        )
    if path.exists() and resume:
        old = json.loads(path.read_text(encoding="utf-8"))
        if key := _differs(old, identity):
            raise RunDirectoryError(
                f"{folder} is a training with another `{key}`",
                fix="use the original configuration and runs, or --overwrite",
            )
    if path.exists() and overwrite:
        for child in folder.iterdir():
            if child.is_dir() and ((child / RESULT).exists() or (child / CHECKPOINT).exists()):
                shutil.rmtree(child)
        checkpoint.delete(folder)
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    journal.write_text_durably(path, json.dumps(identity, indent=1) + "\n")


def train_all(config: SaeTrainConfig, prepared: Prepared, folder: Path, tell: Callable[[str], Tell]) -> None:
    """Train and judge every dictionary that is not there yet."""
    runs, variance = prepared.runs, variance_of(prepared.train.batches())
    material = Material(
        prepared.held_out,
        prepared.scale,
        prepared.identity,
        model_of(runs),
        [facts_of_run(run) for run in runs],
        prepared.train,
        variance,
        prepared.order.epoch_length,
    )
    shelf = Shelf(prepared.train, prepared.order)

    def batch(step: int) -> torch.Tensor:
        return shelf.batch(step, config.batch_size)

    for name, latents, seed in wanted(config):
        place = folder / name
        if (place / RESULT).exists():
            continue
        task = Task(
            config.recipe,
            latents,
            seed,
            batch,
            prepared.scale,
            curve_rows(prepared.held_out),
            place,
            config.checkpoint_every,
        )
        judge_and_write(config, material, train(task, tell(name)), place, latents, seed)
        shutil.rmtree(place / CHECKPOINT, ignore_errors=True)


def curve_rows(held_out: Harvested) -> torch.Tensor:
    """A sample of the rows held out, for learning curves `[n, D]`."""
    shown = np.random.default_rng(1).choice(len(held_out), min(CURVE_ROWS, len(held_out)), replace=False)
    return held_out.x_ND[torch.from_numpy(shown)].float()


def sampled(rows: Rows, most: int) -> Rows:
    """So many of the rows at most, drawn at random."""
    if len(rows) <= most:
        return rows
    return rows.only(np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False)))


def read_results(config: SaeTrainConfig, folder: Path, name: str) -> TrainResult:
    """What the folder of a training holds.

    Raises:
        RunDirectoryError: it is none, or a dictionary is missing.
    """
    try:
        identity = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        if config.harvest is not None:
            identity["rows"] |= json.loads((folder / SERVED).read_text(encoding="utf-8"))
        found = {n: json.loads((folder / n / RESULT).read_text(encoding="utf-8")) for n, _, _ in wanted(config)}
    except (OSError, ValueError) as e:
        raise RunDirectoryError(f"{folder} holds no complete training: {e}", fix="finish it with --resume") from e
    each = [{"dictionary": n, **r["dictionary"]} for n, r in found.items()]
    tables = {
        part: pd.DataFrame([{"dictionary": n, **row} for n, r in found.items() for row in r[part]])
        for part in ("groups", "curve")
    }
    left_out = pd.DataFrame(next(iter(found.values()))["left_out"], columns=["reason", "segment", "rows"])
    return TrainResult(name, identity, pd.DataFrame(each), tables["groups"], tables["curve"], left_out)


def labels(rows: Harvested) -> dict[str, Any]:
    """Groups that an SAE is judged by: segment, phase, and band of positions (bins that double)."""
    tokens = rows.tokens
    bins = bins_of(tokens["position"].to_numpy())
    starts = tokens.groupby(bins)["position"].agg(["min", "max"])
    names = {b: f"{low} to {high}" for b, low, high in starts.itertuples(name=None)}
    return {
        "segment": tokens["segment"].astype(str),
        "phase": tokens["phase"].astype(str),
        "position": [names[b] for b in bins],
    }


def judge_and_write(config: SaeTrainConfig, of: Material, made: Trained, place: Path, latents: int, seed: int) -> None:
    """Store the weights, and judge what is stored."""
    held_out = of.held_out
    numbers: dict[str, Any] = {}
    dtype = torch.bfloat16 if config.store == "bfloat16" else None
    sae = made.sae
    if dtype is not None:  # what is stored is what is calibrated and judged
        write_sae(sae, place, dtype=dtype)
        sae = read_sae(place)
    if config.recipe.batch_topk:
        rows = held_out.x_ND[:: max(1, len(held_out) // CALIBRATION_ROWS)].float()
        as_trained = evaluate(sae, held_out.batches())
        numbers = {
            "threshold_as_trained": shared_threshold(sae),
            "threshold": threshold_for(sae, rows, config.k),
            "as_trained": as_trained.to_json(),
        }
        threshold = torch.full_like(sae.b_enc, numbers["threshold"])
        sae = replace(sae, threshold=threshold)
    found = evaluate(sae, held_out.batches(), groups=labels(held_out))
    evaluation = {**found.to_json(), **numbers, "families": int(held_out.tokens["family"].nunique())}
    training = {
        "config": of.identity["config"],
        "latents": latents,
        "seed": seed,
        "scale": of.scale,
        "rows": of.identity["rows"],
        "epochs": config.recipe.steps * config.batch_size / of.epoch,
        "training_variance": of.variance,
        "sae_lens": require_sae_lens(),
        "torch": torch.__version__,
    }
    told = manifest_from(of.model, of.facts, of.left_out, training=training, evaluation=evaluation)
    sae = sae.with_metadata(
        model_name=of.identity["model"],
        hook_name=config.hook_point,
        training_architecture=config.architecture,
        **{KEY: plain(told)},
    )
    write_sae(sae, place, dtype=dtype)
    dictionary = {
        "latents": latents,
        "seed": seed,
        **{k: v for k, v in evaluation.items() if not isinstance(v, dict)},
        "explained_variance_as_trained": numbers.get("as_trained", {}).get("explained_variance"),
        "l0_as_trained": numbers.get("as_trained", {}).get("l0"),
        "seconds": made.seconds,
        "weights_sha256": weights_sha256(place),
    }
    result = {
        "dictionary": dictionary,
        "groups": found.groups.to_dict("records"),
        "curve": made.curve.to_dict("records"),
        "left_out": of.left_out.left_out.to_dict("records"),
    }
    journal.write_text_durably(place / RESULT, json.dumps(plain(result), indent=1) + "\n")


def _differs(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> str | None:
    """The first key in which two trainings differ."""
    for key in [*new, *(k for k in old if k not in new)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := _differs(a, b, f"{path}{key}."):
                return found
        elif a != b:
            return f"{path}{key}"
    return None
