"""Scores of probes that were written in the step, as a frame (see `Run.scores`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import schema
from sglang_probe.run import tokens as positions
from sglang_probe.run.damage import reading
from sglang_probe.run.files import RunFiles
from sglang_probe.run.hook_points import score_points

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "scores.safetensors"
"""The vectors of a run's scores, float32 `[d]` by name. A live recording has none: its manifest has their hashes."""
_KEEP = ["rid", "position", "token_id", "segment", "status", "phase", "forward_id", "intervention"]


def columns_of(run: RunFiles, hook_point: str) -> list[str]:
    """Names of the columns of a hook point `hook_scores`.

    Raises:
        RunDirectoryError: the manifest does not have them.
    """
    told = (run.manifest.get("scores") or {}).get(hook_point)
    if not isinstance(told, dict) or not told:
        raise RunDirectoryError(
            f"{run.path} does not say whose scores `{hook_point}` has", fix="restore its manifest from a copy"
        )
    return list(told)


def read_scores(run: RunFiles) -> pd.DataFrame:
    """See `Run.scores`.

    Raises:
        RunDirectoryError: none were recorded.
    """
    points = score_points(run.hook_points)
    if not points:
        raise RunDirectoryError(
            f"{run.path} has no scores", fix="record it with `scores` and a hook point `blocks.<layer>.hook_scores`"
        )
    tokens = positions.read_tokens(run, interrupted=False)
    tokens = tokens[tokens["phase"] != schema.OVERSHOOT]
    rows = tokens["source_row"].to_numpy()
    held = {p: run.holds(p, rows) for p in points}
    any_held = np.logical_or.reduce(list(held.values()))
    frame = tokens.loc[any_held, _KEEP].reset_index(drop=True)
    for point in points:
        at = held[point][any_held]
        values = run.rows(point, rows[held[point]]).float().numpy()
        for k, name in enumerate(columns_of(run, point)):
            column = np.full(len(frame), np.nan, dtype=np.float32)
            column[at] = values[:, k]
            frame[name] = column
    return frame


def read_weights(run: RunFiles) -> dict[str, torch.Tensor] | None:
    """The vectors of the run's scores by name, float32 `[d]`; None: they are not with it."""
    from safetensors.torch import load_file

    path = run.path / WEIGHTS_FILE
    if not path.exists():
        return None
    with reading(path):
        found: dict[str, Any] = load_file(path)
    return found
