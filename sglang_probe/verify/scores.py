"""Scores that were written in the step: their shape, and, where the run holds the rows too, that they are of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sglang_probe.run.hook_points import RESID_POST, parse_hook_point, score_points
from sglang_probe.run.run import Run
from sglang_probe.run.scores import WEIGHTS_FILE, columns_of, read_weights
from sglang_probe.verify.check import Check
from sglang_probe.verify.rows import Shard, missing_rows, shape_of, shards_of

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-5
"""Of the product of the lengths of row and vector: what fp32 sums in two orders may differ by, with room to spare
(`d` up to 16,384 gives about 1e-6)."""


def scores_are_of_their_rows(run: Run) -> Check:
    """Every score is finite and in its place, and `x @ w` of the row that was captured beside it."""
    name = "scores"
    claim = "every hook point of scores has a finite number for each probe and row, `x @ w` of the captured row"
    weights = read_weights(run)
    covered = compared = 0
    for h in score_points(run.hook_points):
        names = columns_of(run, h)
        if weights is not None and (lacking := [n for n in names if n not in weights]):
            return Check(name, claim, covered, "scores", f"{WEIGHTS_FILE} has no vector of `{lacking[0]}`")
        beside = f"blocks.{parse_hook_point(h).layer}.{RESID_POST}"
        w_DK = None
        if weights is not None and beside in run.hook_points:
            import torch

            w_DK = torch.stack([weights[n].double() for n in names], dim=1)
        for shard in shards_of(run, h):
            found = shape_of(run, h, shard, "float32", {h: len(names)}) or _not_finite(shard)
            if found is None and w_DK is not None:
                found, n = _not_of_rows(run, shard, beside, w_DK, names)
                compared += n
            if found is not None:
                return Check(name, claim, covered, "scores", f"{shard.file}: {found}")
            covered += shard.rows.numel()
        if (found := missing_rows(run, h)) is not None:
            return Check(name, claim, covered, "scores", found)
    note = None if compared == covered else f"{compared} were compared with rows; of the others no row is in this run"
    if weights is None:
        note = f"none was compared with rows: {WEIGHTS_FILE} is not in this run"
    return Check(name, claim, covered, "scores", None, note)


def _not_finite(shard: Shard) -> str | None:
    bad = ~shard.rows.isfinite().all(1)
    return f"row {int(bad.int().argmax())} of the file is not finite" if bool(bad.any()) else None


def _not_of_rows(run: Run, shard: Shard, beside: str, w_DK: torch.Tensor, names: list[str]) -> tuple[str | None, int]:
    """What is wrong, and how many scores were compared."""
    import torch

    first = shard.part.rows_end - shard.part.rows
    numbers = first + (np.arange(len(shard.rows)) if shard.index is None else shard.index)
    held = run.holds(beside, numbers)
    x_ND = run.rows(beside, numbers[held]).double()
    if x_ND.shape[1] != len(w_DK):
        return f"{WEIGHTS_FILE} has vectors of {len(w_DK)} numbers, and rows have {x_ND.shape[1]}", 0
    error_NK = (x_ND @ w_DK - shard.rows[torch.from_numpy(held)].double()).abs()
    wrong_NK = error_NK > TOLERANCE * x_ND.norm(dim=1)[:, None] * w_DK.norm(dim=0)
    if bool(wrong_NK.any()):
        n, k = (int(i) for i in wrong_NK.nonzero()[0])
        return (
            f"the score of `{names[k]}` at row {numbers[held][n]} is not that of the row: off by {error_NK[n, k]:.2g}",
            0,
        )
    return None, error_NK.numel()
