"""Drift by decode step: what each step's queries have in common with the observation window, in bins of steps."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sglang_probe.stats.distance import jensen_shannon
from sglang_probe.studies.query_drift.captured import Captured
from sglang_probe.studies.query_drift.cosine import CosineDrift, cosine_drift, window_rotation_null
from sglang_probe.studies.query_drift.functional import functional_drift

COSINES = tuple(f.name for f in fields(CosineDrift))
METRICS = (*COSINES, "null_post", "functional", "js")
"""Columns of `step_drift`: cosines to the window, the rotation-only null of `post`, functional drift, and the
Jensen-Shannon divergence between what the window and the steps read."""


def step_bins(steps: int) -> list[tuple[int, int]]:
    """Steps `[start, end)` of each bin, counted from 0 and doubling: step 1, steps 2 and 3, 4 to 7, 8 to 15, ..."""
    bins, start = [], 0
    while start < steps:
        bins.append((start, min(2 * start + 1, steps)))
        start = 2 * start + 1
    return bins


def step_drift(c: Captured, *, sinks: int) -> pd.DataFrame:
    """One row per head and bin: `head, step` (first of the bin, from 1), `steps` (how many), and `METRICS` as means.

    `js` is of each step's weights over the prompt positions that are neither sinks nor window.
    """
    drift = cosine_drift(
        c.decode_pre_THD, c.window_pre_NHD, c.mean_HD, c.rotary, decode_at=c.decode_at, window_at=c.window_at
    )
    by_step = {name: getattr(drift, name) for name in COSINES}
    by_step["null_post"] = window_rotation_null(
        c.decode_pre_THD, c.rotary, decode_at=c.decode_at, window_at=c.window_at
    )
    assert c.layer.future is not None
    post_window = c.layer.q_NHD[-c.window :]
    by_step["functional"] = functional_drift(c.layer.future.q_THD, post_window, c.layer.k_LGD)
    by_step["js"] = jensen_shannon(decode_importance(c, sinks), window_importance(c, sinks)[:, None]).mT
    heads = np.arange(c.decode_pre_THD.shape[1])
    frames = []
    for start, end in step_bins(c.steps):
        values = {name: x[start:end].mean(0).numpy() for name, x in by_step.items()}
        frames.append(pd.DataFrame({"head": heads, "step": start + 1, "steps": end - start, **values}))
    return pd.concat(frames, ignore_index=True)


def decode_importance(c: Captured, sinks: int) -> Tensor:
    """Weights of each decode step over the candidates, `[H, T, L - sinks - window]`."""
    return c.attention_HTJ()[..., sinks : c.length - c.window]


def window_importance(c: Captured, sinks: int) -> Tensor:
    """Summed weights of the window's queries over the candidates, `[H, L - sinks - window]`."""
    return c.layer.prompt_attention(c.window).flatten(0, 1).sum(1)[..., sinks : c.length - c.window]


def importance_cosines(c: Captured, windows: tuple[int, ...], sinks: int) -> pd.DataFrame:
    """Cosine between window-averaged attention and what the whole response reads, per window length.

    Columns `window`, `cosine` (over the whole prompt before the window, as DapQ's Table 8 has it; sinks dominate it)
    and `without_sinks`. Means over heads.
    """
    longest = max(windows)
    gold = c.attention_HTJ()[..., : c.length - longest].sum(1)
    a = c.layer.prompt_attention(longest).flatten(0, 1)[..., : c.length - longest]
    rows = []
    for w in windows:
        ours = a[:, longest - w :].mean(1)
        whole, rest = (
            torch.nn.functional.cosine_similarity(ours[:, s:], gold[:, s:], dim=-1).mean().item() for s in (0, sinks)
        )
        rows.append({"window": w, "cosine": whole, "without_sinks": rest})
    return pd.DataFrame(rows)
