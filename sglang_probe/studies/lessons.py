"""Dictionaries of a comparison: several that differ in one thing, trained with one recipe and judged by one rule.

Folder: `training.json` (what they are of), and a folder for each with weights and `result.json`. What is there is kept,
and an interrupted one goes on from its checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.errors import RunDirectoryError
from sglang_probe.harvest.progress import Reporter
from sglang_probe.run import journal
from sglang_probe.sae.folder import read_sae, write_sae
from sglang_probe.sae.manifest import KEY
from sglang_probe.sae.recipe import Recipe
from sglang_probe.sae.sae import SAE
from sglang_probe.sae.threshold import recalibrated
from sglang_probe.sae.train import CHECKPOINT, Task, require_sae_lens, train
from sglang_probe.studies.base import plain
from sglang_probe.studies.sae_train.study import RESULT, open_folder

if TYPE_CHECKING:
    import torch

FOLDER = "dictionaries"
CALIBRATION_ROWS, CURVE_ROWS = 8192, 2048


@dataclass(frozen=True)
class Lesson:
    """One dictionary to train."""

    name: str
    batch: Callable[[int], torch.Tensor]
    """Rows of a step, float32 `[batch_size, D]`."""
    seed: int
    """Of the initialisation."""
    of: Mapping[str, Any] = field(default_factory=dict)
    """What it was trained on, for its manifest."""


def train_missing(
    lessons: Sequence[Lesson],
    folder: Path,
    *,
    recipe: Recipe,
    latents: int,
    scale: float,
    held_out: torch.Tensor,
    metadata: Mapping[str, Any],
    identity: dict[str, Any],
    overwrite: bool,
    resume: bool,
    reporter: Reporter,
) -> None:
    """Train the dictionaries that are not there yet.

    Args:
        folder: of the study; the dictionaries go to `dictionaries` in it.
        scale: of all of them, so that they differ in nothing else.
        held_out: rows by which all thresholds are set, and learning curves drawn, `[n, D]`.
        metadata: of SAELens' configuration: `model_name`, `hook_name`.
        identity: all that decides what is trained.

    Raises:
        ConfigError: SAELens is not installed.
        RunDirectoryError: the folder holds other dictionaries.
    """
    require_sae_lens()
    place = folder / FOLDER
    # A study whose recording was finished may have none yet: `resume` and `overwrite` are of both.
    open_folder(place, plain(identity), overwrite=overwrite, resume=resume)
    calibration = held_out[:: max(1, len(held_out) // CALIBRATION_ROWS)].float()
    for lesson in lessons:
        mine = place / lesson.name
        if (mine / RESULT).exists():
            continue
        with reporter.requests(f"training {lesson.name}: steps", recipe.steps) as counter:

            def batch(step: int, lesson: Lesson = lesson, counter: Any = counter) -> torch.Tensor:
                rows = lesson.batch(step)
                counter.advance(len(rows))
                return rows

            shown = held_out[:: max(1, len(held_out) // CURVE_ROWS)].float()
            made = train(Task(recipe, latents, lesson.seed, batch, scale, shown, mine))
        sae = recalibrated(made.sae, calibration, recipe.k) if recipe.batch_topk else made.sae
        told = {"training": {**identity, **lesson.of, "seed": lesson.seed, "latents": latents, "scale": scale}}
        write_sae(sae.with_metadata(**metadata, **{KEY: plain(told)}), mine)
        result = {"seconds": made.seconds, "curve": made.curve.to_dict("records")}
        journal.write_text_durably(mine / RESULT, json.dumps(plain(result), indent=1) + "\n")
        shutil.rmtree(mine / CHECKPOINT, ignore_errors=True)


def read_lessons(folder: Path, names: Sequence[str]) -> dict[str, SAE]:
    """The dictionaries of a study, by name.

    Raises:
        RunDirectoryError: one is missing.
    """
    place = folder / FOLDER
    if missing := [n for n in names if not (place / n / RESULT).exists()]:
        raise RunDirectoryError(
            f"{place} lacks {len(missing)} of {len(names)} dictionaries, e.g. {missing[0]}", fix="finish it: --resume"
        )
    return {name: read_sae(place / name) for name in names}


def curves(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The learning curve of each, as rows with its `dictionary`."""
    found = []
    for name in names:
        result = json.loads((folder / FOLDER / name / RESULT).read_text(encoding="utf-8"))
        found += [{"dictionary": name, **row} for row in result["curve"]]
    return found
