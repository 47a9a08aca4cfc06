"""Weights of positions, and drawing rows by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import RunDirectoryError

Array = np.ndarray[Any, Any]


def weights_of(tokens: pd.DataFrame, weight: str | Path | pd.DataFrame) -> Array:
    """The weight of each position, float64 [len(tokens)]; 0 where the weights do not name it.

    Args:
        tokens: columns rid and position.
        weight: a frame with columns rid, start, end and weight, one row per range of positions, or its Parquet file.

    Raises:
        RunDirectoryError: no such file, or a column is missing.
    """
    if not isinstance(weight, pd.DataFrame):
        if not Path(weight).is_file():
            raise RunDirectoryError(
                f"unknown weight `{weight}`", fix="use `unique`, `traffic`, or the path of a weights file"
            )
        weight = pd.read_parquet(weight)
    if absent := {"rid", "start", "end", "weight"} - set(weight.columns):
        raise RunDirectoryError(
            f"the weights have no column `{min(absent)}`", fix="`sglang-probe coverage` writes them"
        )
    names = pd.Index(tokens["rid"].unique())
    number = names.get_indexer(weight["rid"])
    ranges = weight[number >= 0]
    key = number[number >= 0].astype(np.int64) << 32 | ranges["start"].to_numpy(np.int64)
    order = np.argsort(key, kind="stable")
    asked = names.get_indexer(tokens["rid"]).astype(np.int64) << 32 | tokens["position"].to_numpy(np.int64)
    at = np.searchsorted(key[order], asked, side="right") - 1
    if not len(order):
        return np.zeros(len(asked))
    found = order[np.maximum(at, 0)]
    inside = (at >= 0) & (key[found] >> 32 == asked >> 32)
    inside &= (asked & 0xFFFFFFFF) < ranges["end"].to_numpy(np.int64)[found]
    return np.where(inside, ranges["weight"].to_numpy(np.float64)[found], 0.0)


def copies(weights: Array, rng: np.random.Generator) -> Array:
    """How often each row is drawn: its weight rounded up or down at random, by systematic sampling.

    The mean is the weight, and the total is the sum of the weights to within one.

    Raises:
        RunDirectoryError: a weight is negative or NaN.
    """
    if not np.all(weights >= 0):
        raise RunDirectoryError("a weight is negative or missing", fix="give weights of at least 0")
    ticks = np.floor(np.concatenate([[0.0], np.cumsum(weights)]) + rng.random())
    return np.diff(ticks).astype(np.int64)
