"""Shards of rows: their tensors, and which rows they hold."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_probe.run.damage import reading

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
ROWS_KEY = "rows"
"""Name of the tensor in a shard."""
INDEX_KEY = "index"
"""Name of a second one, int64 `[n]`, in shards of hook points that do not hold every row: the number of each row,
counted from the first of the part."""


def rows_of(path: Path) -> torch.Tensor:
    """The rows of a shard, `[n, width]`."""
    with reading(path):
        return _rows_of(path, path.stat().st_mtime_ns)


def index_of(path: Path) -> Array | None:
    """Numbers of a shard's rows, counted from the first of its part, ascending `[n]`; None: it holds all of them."""
    with reading(path):
        return _index_of(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _rows_of(path: Path, _written: int) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(path)[ROWS_KEY]


@functools.lru_cache(maxsize=64)
def _index_of(path: Path, _written: int) -> Array | None:
    from safetensors import safe_open

    with safe_open(path, framework="np") as f:
        return np.asarray(f.get_tensor(INDEX_KEY)) if INDEX_KEY in f.keys() else None  # noqa: SIM118 (not a mapping)


def place_of(path: Path, wanted: Array) -> Array:
    """Where in a shard the rows of these numbers are, `[len(wanted)]`; -1: it does not hold them."""
    index = index_of(path)
    if index is None:
        return wanted
    at = np.minimum(np.searchsorted(index, wanted), len(index) - 1)
    return np.where(index[at] == wanted, at, -1)
