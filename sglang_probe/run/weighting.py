"""Weights of positions, and drawing rows by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import RunDirectoryError

Array = np.ndarray[Any, Any]


class Weights:
    """Weights of ranges of positions, to be looked up.

    Args:
        ranges: columns rid, start, end and weight, one row per range of positions.

    Raises:
        RunDirectoryError: a column is missing.
    """

    def __init__(self, ranges: pd.DataFrame) -> None:
        if absent := {"rid", "start", "end", "weight"} - set(ranges.columns):
            raise RunDirectoryError(
                f"the weights have no column `{min(absent)}`", fix="`sglang-probe coverage` writes them"
            )
        number, names = pd.factorize(ranges["rid"])
        key = number.astype(np.int64) << 32 | ranges["start"].to_numpy(np.int64)
        order = np.argsort(key, kind="stable")
        self._names, self._key = pd.Index(names), key[order]
        self._end, self._weight = ranges["end"].to_numpy(np.int64)[order], ranges["weight"].to_numpy(np.float64)[order]

    @classmethod
    def read(cls, weight: str | Path | pd.DataFrame) -> Weights:
        """From the Parquet file of such a frame, or the frame.

        Raises:
            RunDirectoryError: no such file, or a column is missing.
        """
        if isinstance(weight, pd.DataFrame):
            return cls(weight)
        if not Path(weight).is_file():
            raise RunDirectoryError(
                f"unknown weight `{weight}`", fix="use `unique`, `traffic`, or the path of a weights file"
            )
        return cls(pd.read_parquet(weight))

    def of(self, tokens: pd.DataFrame) -> Array:
        """The weight of each position (columns rid and position), float64 `[len(tokens)]`; 0 where none is named."""
        if not len(self._key):
            return np.zeros(len(tokens))
        number = self._names.get_indexer(tokens["rid"])
        position = tokens["position"].to_numpy(np.int64)
        asked = number.astype(np.int64) << 32 | position
        at = np.searchsorted(self._key, asked, side="right") - 1
        found = np.maximum(at, 0)
        inside = (at >= 0) & (number >= 0) & (self._key[found] >> 32 == number) & (position < self._end[found])
        return np.where(inside, self._weight[found], 0.0)


class Copies:
    """How often each row is drawn: its weight rounded up or down at random, by systematic sampling.

    The mean is the weight, and the total is the sum of the weights to within one. Weights may come in parts.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng, self._offset = rng, -1.0
        self._sum = 0.0

    def of(self, weights: Array) -> Array:
        """Of the next rows, int64 `[len(weights)]`.

        Raises:
            RunDirectoryError: a weight is negative or NaN.
        """
        if not np.all(weights >= 0):
            raise RunDirectoryError("a weight is negative or missing", fix="give weights of at least 0")
        if self._offset < 0:
            self._offset = self._rng.random()
        sums = np.cumsum(np.concatenate([[self._sum], weights]))
        self._sum = float(sums[-1])
        return np.diff(np.floor(sums + self._offset)).astype(np.int64)
