"""Kept sets on disk: which prompt positions each kv head of each layer may still attend to.

A kept set holds for the first `n` positions of one request, its *cache*: the whole prompt where the question is visible
when the cache is compressed, the context alone where it is not. One file holds many, each under a key that a request
names; bits are packed and the counts per head are stored beside them, so that a damaged set is noticed.

Shapes: S steps, Y layers, G kv heads, N positions of the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from sglang_probe.errors import ProbeError

FORMAT = "sglang-probe kept sets 1"


@dataclass(frozen=True)
class Kept:
    """The kept positions of one request. Heads, layers and steps may keep different numbers of them."""

    keep_SYGN: Tensor
    """Bool. S is 1 for an eviction. A selection that changes while decoding has one entry for each position after the
    cache: entry `p - N` holds for the query at position `p`, and the last one for all that follow."""

    def __post_init__(self) -> None:
        if self.keep_SYGN.dtype != torch.bool or self.keep_SYGN.ndim != 4 or 0 in self.keep_SYGN.shape:
            raise ProbeError(
                f"a kept set is bool [steps, layers, kv heads, positions], not {self.keep_SYGN.dtype} "
                f"{list(self.keep_SYGN.shape)}"
            )

    @property
    def length(self) -> int:
        """Number of positions N that the set is about."""
        return self.keep_SYGN.shape[-1]

    @property
    def heads(self) -> tuple[int, int]:
        """Layers and kv heads."""
        return self.keep_SYGN.shape[1], self.keep_SYGN.shape[2]

    @property
    def counts_SYG(self) -> Tensor:
        """Positions kept per step, layer and head."""
        return self.keep_SYGN.sum(-1)

    def at(self, position: int) -> Tensor:
        """What the query at `position >= N` may attend to, bool `[Y, G, N]`."""
        return self.keep_SYGN[min(position - self.length, len(self.keep_SYGN) - 1)]


def write_kept(path: Path, kept: Mapping[str, Kept], *, notes: Mapping[str, Any] | None = None) -> None:
    """Write kept sets by key (safetensors).

    Args:
        notes: anything worth knowing of a key (method, budget), as JSON; `KeptFile.notes` gives it back.
    """
    tensors: dict[str, np.ndarray] = {}
    shapes = {}
    for key, one in kept.items():
        bits = one.keep_SYGN.numpy()
        shapes[key] = list(bits.shape)
        tensors[f"bits/{key}"] = np.packbits(bits.reshape(-1))
        tensors[f"counts/{key}"] = one.counts_SYG.numpy().astype(np.int32)
    metadata = {"format": FORMAT, "shapes": json.dumps(shapes), "notes": json.dumps(dict(notes or {}))}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata)


class KeptFile(Mapping[str, Kept]):
    """The kept sets of a file, by key. They stay packed in memory and are unpacked when asked for.

    Raises (on construction):
        ProbeError: it is no such file, or a set does not keep as many positions as the file says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="np") as f:
                metadata = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, ValueError, RuntimeError) as e:
            raise ProbeError(f"{path} cannot be read as kept sets: {e}") from e
        except Exception as e:  # safetensors' own error has no public base
            raise ProbeError(f"{path} is damaged: {e}", fix="write it again") from e
        if metadata.get("format") != FORMAT:
            raise ProbeError(f"{path} holds no kept sets", fix="write it with `write_kept`")
        self.notes: dict[str, Any] = json.loads(metadata["notes"])
        self.shapes: dict[str, tuple[int, ...]] = {k: tuple(s) for k, s in json.loads(metadata["shapes"]).items()}
        """Steps, layers, kv heads and positions of each set."""
        self.counts: dict[str, np.ndarray] = {k: tensors[f"counts/{k}"] for k in self.shapes}
        self._bits = {k: tensors[f"bits/{k}"] for k in self.shapes}
        for key in self.shapes:
            self._unpacked(key)

    def __getitem__(self, key: str) -> Kept:
        return Kept(torch.from_numpy(self._unpacked(key)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def digest(self, keys: Iterable[str]) -> str:
        """SHA-256 of the sets of `keys`, whatever else the file holds."""
        h = hashlib.sha256()
        for key in sorted(set(keys)):
            h.update(json.dumps([key, self.shapes[key]]).encode() + self._bits[key].tobytes())
        return h.hexdigest()

    def write_subset(self, path: Path, keys: Iterable[str]) -> None:
        """Write the sets of `keys` alone to another file."""
        wanted = sorted(set(keys))
        write_kept(path, {k: self[k] for k in wanted}, notes={k: self.notes[k] for k in wanted if k in self.notes})

    def _unpacked(self, key: str) -> np.ndarray:
        shape = self.shapes[key]
        bits = np.unpackbits(self._bits[key], count=int(np.prod(shape))).reshape(shape).astype(bool)
        if not np.array_equal(bits.sum(-1), self.counts[key]):
            raise ProbeError(f"{self.path}: `{key}` does not keep what the file says it keeps", fix="write it again")
        return bits
