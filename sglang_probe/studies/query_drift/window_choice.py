"""What a window's choice of positions is worth at every decode step, beside two baselines; and negative controls."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.methods.snapkv import SnapKV
from sglang_probe.eviction.methods.streaming_llm import StreamingLLM
from sglang_probe.eviction.metrics import (
    candidate_share,
    nontrivial_mass_chance,
    nontrivial_mass_recall,
    trivial_mask,
)
from sglang_probe.stats.distance import jensen_shannon
from sglang_probe.studies.query_drift.captured import Captured
from sglang_probe.studies.query_drift.cosine import nearest_cosine, window_cosine
from sglang_probe.studies.query_drift.options import DriftOptions
from sglang_probe.studies.query_drift.steps import window_importance

CONTROLS = ("as recorded", "another request's queries", "window from the start", "shuffled keys")


@dataclass(frozen=True)
class Recall:
    """Non-trivial mass by decode step `[T]`, pooled over the heads of a layer."""

    window: Tensor
    recency: Tensor
    random: Tensor
    """Expectation of random candidates, exact."""


def budget_of(c: Captured, o: DriftOptions) -> int:
    """Positions to keep: the share of the prompt, and at least eight candidates."""
    return max(round(o.budget * c.length), o.sinks + c.window + 8)


def scorer(o: DriftOptions) -> SnapKV:
    """The window's own choice, not pooled: pooling assumes that neighbours matter together, which drift does not."""
    return SnapKV(window=o.window, recent=o.window, sinks=o.sinks, pooling="none")


def recall_by_step(c: Captured, o: DriftOptions) -> Recall:
    """Mass that decode steps find among what the window chose, what is most recent, and what chance gives."""
    a = c.layer.future_attention
    trivial = trivial_mask(c.length, sinks=o.sinks, window=c.window)
    budget = budget_of(c, o)
    window = scorer(o).select(c.layer, budget).keep_TGL
    recency = StreamingLLM(sinks=o.sinks).select(c.layer, budget).keep_TGL
    return Recall(
        nontrivial_mass_recall(a, window, trivial).pooled(0, 1),
        nontrivial_mass_recall(a, recency, trivial).pooled(0, 1),
        nontrivial_mass_chance(a, window, trivial).pooled(0, 1),
    )


def control_rows(c: Captured, other: Captured, o: DriftOptions, *, seed: int) -> pd.DataFrame:
    """Four measures as recorded and with something broken on purpose, each where it applies.

    Columns: `control`, `pre_centred` (cosine of the late steps to the mean window query), `pre_centred_nearest`, `js`,
    `mass` (non-trivial mass of the window's choice) and `mass_chance`. Late: the second half of the steps.

    Args:
        other: the same layer of another request, whose decode queries and window take the place of this one's.
    """
    start = range(o.sinks, o.sinks + c.window)
    late = c.decode_pre_THD[c.steps // 2 :]
    strangers = other.decode_pre_THD[other.steps // 2 :]
    windows = {
        "as recorded": (late, c.window_pre_NHD, c.layer),
        "another request's queries": (strangers, c.window_pre_NHD, _with_window(c, other.window_pre_NHD)),
        "window from the start": (
            late,
            c.prompt_pre_LHD[start.start : start.stop],
            _with_window(c, c.prompt_pre_LHD[start.start : start.stop]),
        ),
        "shuffled keys": (late, c.window_pre_NHD, _shuffled(c, o, seed)),
    }
    rows = []
    for name in CONTROLS:
        queries, window, layer = windows[name]
        rows.append({"control": name, **_measure(c, o, queries, window, layer)})
    frame = pd.DataFrame(rows)
    # Keys have no part in a cosine.
    frame.loc[frame["control"] == "shuffled keys", ["pre_centred", "pre_centred_nearest"]] = np.nan
    return frame


def _measure(c: Captured, o: DriftOptions, queries: Tensor, window: Tensor, layer: Layer) -> dict[str, float]:
    q, w = c.centred(queries), c.centred(window)
    trivial = trivial_mask(c.length, sinks=o.sinks, window=c.window)
    keep = scorer(o).select(layer, budget_of(c, o)).keep_TGL
    a = c.layer.future_attention
    reads = c.attention_HTJ()[..., o.sinks : c.length - c.window].sum(1)
    return {
        "pre_centred": float(window_cosine(q, w).mean()),
        "pre_centred_nearest": float(nearest_cosine(q, w).mean()),
        "js": float(jensen_shannon(reads, window_importance(replace(c, layer=layer), o.sinks)).mean()),
        "mass": float(nontrivial_mass_recall(a, keep, trivial).pooled()),
        "mass_chance": float(candidate_share(keep, trivial).mean()),
    }


def _with_window(c: Captured, pre_NHD: Tensor) -> Layer:
    """The layer with other queries at the window's positions."""
    q = c.layer.q_NHD.clone()
    q[-c.window :] = c.rotary.rotate(pre_NHD, c.window_at).to(q.dtype)
    return replace(c.layer, q_NHD=q)


def _shuffled(c: Captured, o: DriftOptions, seed: int) -> Layer:
    """The layer whose candidates' keys changed places, for scoring alone."""
    k = c.layer.k_LGD.clone()
    end = c.length - c.window
    order = torch.randperm(end - o.sinks, generator=torch.Generator().manual_seed(seed))
    k[o.sinks : end] = k[o.sinks : end][order]
    return replace(c.layer, k_LGD=k)
