"""Labels that a model gave in a study of features, read from its folder: for exports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.report.page import TABLES
from sglang_probe.studies.base import SUMMARY
from sglang_probe.studies.features.arms import OWN


@dataclass(frozen=True)
class Labelled:
    """Labels of one dictionary by one model."""

    of: Mapping[str, Any]
    """Who was asked, as `labels_asked` of the summary: `model`, `weights_sha256`, `judge`, `prompts_sha256`, ..."""
    scores: pd.DataFrame
    """Means beside the nulls, as `FeaturesResult.scores`."""
    labels: pd.DataFrame
    """A row for each latent that has a label, columns as `asked.COLUMNS`."""

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.of["model"])

    def nulls(self, score: str) -> dict[str, float]:
        """What labels of this model score in the mean, and what the nulls do: `labels`, `other_latents`, ..."""
        row = self.scores[(self.scores["label"] == self.model) & (self.scores["score"] == score)].iloc[0]
        return {k: float(v) for k, v in row.drop(["label", "score"]).items() if pd.notna(v)}


def read_labelled(folder: Path, weights: str, hook_point: str) -> Labelled:
    """The labels in the results of `sglang-probe features --label-with`.

    Args:
        weights: SHA-256 of the weights of the SAE that they must be of.

    Raises:
        ConfigError: there are none, or they are of another SAE.
    """
    try:
        told = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        of = told["labels_asked"]
        found = pd.read_parquet(folder / TABLES / "labels_asked.parquet") if of else None
        about, scores = (told["weights_sha256"], told["hook_point"]), pd.DataFrame(told["scores"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{folder} holds no results of `sglang-probe features`: {e}") from e
    if found is None:
        raise ConfigError(f"{folder} has no labels by a model", fix="make them: sglang-probe features --label-with URL")
    if about != (weights, hook_point):
        raise ConfigError(f"the labels of {folder} are of another SAE: weights {about[0][:12]} on `{about[1]}`")
    own = found[(found["arm"] == OWN) & found["label"].notna()]
    return Labelled(of, scores, own.reset_index(drop=True))
