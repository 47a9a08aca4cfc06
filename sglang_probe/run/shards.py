"""Shards of rows: their tensors, and which rows they hold."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.damage import FIX, reading

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


def map_rows(path: Path) -> torch.Tensor:
    """The rows of a shard, `[n, width]`, mapped for as long as the tensor lives: what is not read takes no memory.

    Raises:
        RunDirectoryError: the file is missing or damaged.
    """
    from safetensors.torch import load_file

    with reading(path):
        return load_file(path)[ROWS_KEY]


def index_of(path: Path) -> Array | None:
    """Numbers of a shard's rows, counted from the first of its part, ascending `[n]`; None: it holds all of them."""
    with reading(path):
        return _index_of(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _rows_of(path: Path, _written: int) -> torch.Tensor:
    return map_rows(path)


@functools.lru_cache(maxsize=64)
def _index_of(path: Path, _written: int) -> Array | None:
    from safetensors import safe_open

    with safe_open(path, framework="np") as f:
        return np.asarray(f.get_tensor(INDEX_KEY)) if INDEX_KEY in f.keys() else None  # noqa: SIM118 (not a mapping)


def read_into(path: Path, places: Array, out: torch.Tensor, at: Array) -> None:
    """Read rows of a shard into `out[at]`, and hold nothing of the file afterwards: `rows_of` maps all of it.

    Args:
        places: of the rows in the shard, int64 `[n]`, as `place_of` gives them.
        out: `[N, width]`, contiguous, of the shard's dtype.
        at: int64 `[n]`.

    Raises:
        RunDirectoryError: the file is missing or damaged.
    """
    import torch

    with reading(path):
        start, rows, width, dtype = _layout(path, path.stat().st_mtime_ns)
        if (width, dtype) != (out.shape[1], out.dtype) or (
            len(places) and not 0 <= places.min() <= places.max() < rows
        ):
            raise RunDirectoryError(f"{path} is damaged: it has {rows} rows of {width} numbers ({dtype})", fix=FIX)
        size = width * out.element_size()
        bytes_of: Any = out.view(torch.uint8).numpy()
        into = memoryview(bytes_of).cast("B")
        order = np.argsort(places, kind="stable")
        places, at = places[order], at[order]
        apart = (np.diff(places) != 1) | (np.diff(at) != 1)
        firsts = np.concatenate([[0], np.flatnonzero(apart) + 1]) if len(places) else np.zeros(0, np.int64)
        lengths = np.diff(np.append(firsts, len(places)))
        with open(path, "rb", buffering=0) as file:
            for place, to, n in zip(places[firsts].tolist(), at[firsts].tolist(), lengths.tolist(), strict=True):
                file.seek(start + place * size)
                part = into[to * size : (to + n) * size]
                while len(part):
                    got = file.readinto(part)
                    if not got:
                        raise RunDirectoryError(f"{path} is damaged: it ends within a row", fix=FIX)
                    part = part[got:]


def layout_of(path: Path) -> tuple[int, torch.dtype]:
    """Width and dtype of the rows of a shard."""
    with reading(path):
        _, _, width, dtype = _layout(path, path.stat().st_mtime_ns)
    return width, dtype


@functools.lru_cache(maxsize=4096)
def _layout(path: Path, _written: int) -> tuple[int, int, int, torch.dtype]:
    """Where the rows begin in the file, how many there are, their width and dtype (safetensors: eight bytes with the
    length of a JSON header, which says where each tensor is after it)."""
    import torch

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        told = json.loads(file.read(length))[ROWS_KEY]
    rows, width = told["shape"]
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}[told["dtype"]]
    return 8 + length + int(told["data_offsets"][0]), int(rows), int(width), dtype


def place_of(path: Path, wanted: Array) -> Array:
    """Where in a shard the rows of these numbers are, `[len(wanted)]`; -1: it does not hold them."""
    index = index_of(path)
    if index is None:
        return wanted
    at = np.minimum(np.searchsorted(index, wanted), len(index) - 1)
    return np.where(index[at] == wanted, at, -1)
