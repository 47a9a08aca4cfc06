"""Whether a peer's rows are ours: a benchmark of other numbers is worth nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

TOLERANCE = 1e-3
"""Largest distance of a row, relative to its length: float32, and other kernels in another order."""
PROMPTS, POSITIONS = 24, 12
"""Looked at, of each harvest and layer."""

Sample = list[tuple[int, list[int]]]
"""Prompts, and positions of each."""


def sample_of(count: int, length: int, seed: int = 0) -> Sample:
    """The last position of some prompts, and others drawn at random."""
    rng = random.Random(seed)
    chosen = rng.sample(range(count), min(count, PROMPTS))
    return [(p, [*rng.sample(range(length - 1), min(length - 1, POSITIONS - 1)), length - 1]) for p in chosen]


def theirs(folder: Path, layer: int, sample: Sample, length: int) -> torch.Tensor:
    """Rows `[sampled, width]` that a peer wrote (`child.RowWriter`)."""
    parts, begins, rows = sorted((folder / f"layer-{layer}").iterdir()), [], 0
    files = [safe_open(part, "pt") for part in parts]
    for file in files:
        begins.append(rows)
        rows += file.get_slice("rows").get_shape()[0]
    found = []
    for prompt, positions in sample:
        for row in (prompt * length + p for p in positions):
            part = max(i for i, begin in enumerate(begins) if begin <= row)
            found.append(files[part].get_slice("rows")[row - begins[part] : row - begins[part] + 1])
    return torch.cat(found)


def ours(folder: Path, layer: int, sample: Sample, length: int) -> torch.Tensor:
    """Rows `[sampled, width]` of a run directory; those of reused positions are their origins'."""
    from sglang_probe import load_run

    run = load_run(folder)
    point = f"blocks.{layer}.hook_resid_post"
    return torch.cat([run.activations(f"r{p:06d}", point)[torch.tensor(positions)] for p, positions in sample]).float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest of a row, relative to the length of the row of `b`; infinite where shapes differ or not finite."""
    if a.shape != b.shape or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def worst(found: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Over the layers."""
    return max(distance(a, b) for a, b in zip(found, reference, strict=True))
