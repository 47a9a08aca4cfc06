"""Query drift: how decode queries differ from the prompt queries that eviction methods score with.

Pure functions on captured queries, each beside its null. Shapes: N window or prompt queries, T decode queries, H query
heads, D head dim; results are `[..., T, H]` or `[..., H]`. "pre" is before RoPE and after q-norm, "post" after RoPE.
"""

from __future__ import annotations

from sglang_probe.study.query_drift.cosine import (
    CosineDrift,
    centre,
    cosine_drift,
    nearest_cosine,
    prompt_mean,
    rotation_null,
    window_cosine,
)
from sglang_probe.study.query_drift.excess import ExcessDrift, excess_drift
from sglang_probe.study.query_drift.factorial import Effects, factorial_effects
from sglang_probe.study.query_drift.functional import functional_drift
from sglang_probe.study.query_drift.horizon import (
    Decay,
    Survival,
    first_failure,
    fit_decay,
    kaplan_meier,
    median_interval,
)
from sglang_probe.study.query_drift.subspace import SubspaceDrift, phase_ratio, split_half_energy, subspace_drift

__all__ = [
    "CosineDrift",
    "Decay",
    "Effects",
    "ExcessDrift",
    "SubspaceDrift",
    "Survival",
    "centre",
    "cosine_drift",
    "excess_drift",
    "factorial_effects",
    "first_failure",
    "fit_decay",
    "functional_drift",
    "kaplan_meier",
    "median_interval",
    "nearest_cosine",
    "phase_ratio",
    "prompt_mean",
    "rotation_null",
    "split_half_energy",
    "subspace_drift",
    "window_cosine",
]
