"""A linear probe on the last row of a prompt: a score, and the threshold above which it is said to fire.

Logistic regression with an L2 penalty on standardised rows, both kinds weighing the same, by scipy's L-BFGS: convex, so
that there is one answer. Mean and deviation are folded into the weights and the intercept into the threshold: a row's
score is `x @ vector`, and it fires above `threshold` (CAST, Lee et al. 2024, gates by such a score).

The threshold comes from held-out prompts at a stated false positive rate. With m negatives whose scores are continuous,
a threshold at the k-th largest lets through a new negative with probability k / (m + 1) exactly, whatever the scores'
distribution (the order statistics of split conformal prediction: Vovk et al. 2005); k is the largest with k / (m + 1)
at most the stated rate. Given the held-out prompts that rate is Beta(k, m + 1 - k), which gives its interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import beta

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run
from sglang_probe.stats.auc import auc_interval, roc
from sglang_probe.stats.intervals import Interval
from sglang_probe.steering import contrast, library
from sglang_probe.steering.library import Vector
from sglang_probe.steering.make import Target

Array = np.ndarray[Any, Any]

PENALTY = 0.01
"""Of the squared length of the weights of standardised rows, over two, beside the mean loss of a prompt."""
HELD_OUT = 0.5
"""Share of the prompts that the threshold and the ROC curve come from."""
_ROC_POINTS = 100


@dataclass(frozen=True)
class Gate:
    """A threshold, and how often what should not open it does, and what should."""

    threshold: float
    """A row fires above it."""
    fpr: Interval
    """False positive rate: expected before the held-out prompts are seen, and the central 95 % of what it can be."""
    tpr: Interval
    """True positive rate on the held-out positives, with the exact interval of Clopper and Pearson (1934)."""


@dataclass(frozen=True)
class Probe:
    """A fitted probe, and what held-out prompts say of it."""

    w: Array
    """`[d]` float64: a row's score is `x @ w`."""
    gate: Gate
    auc: Interval
    roc: Array
    """`[points, 3]`: `stats.auc.roc`."""
    train: tuple[int, int]
    """Positive and negative prompts that it was fitted on."""
    held_out: tuple[int, int]


def fit(positive_ND: Array, negative_ND: Array, *, penalty: float = PENALTY) -> Array:
    """The weights `[d]` of raw rows. The intercept is left to the threshold."""
    x = np.concatenate([positive_ND, negative_ND]).astype(np.float64)
    y = np.concatenate([np.ones(len(positive_ND)), -np.ones(len(negative_ND))])
    weight = np.where(y > 0, 0.5 / len(positive_ND), 0.5 / len(negative_ND))
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    z = (x - mean) / deviation

    def loss(parameters: Array) -> tuple[float, Array]:
        w, b = parameters[:-1], parameters[-1]
        margin = y * (z @ w + b)
        pull = -y * weight * expit(-margin)
        value = float((weight * np.logaddexp(0, -margin)).sum() + penalty / 2 * (w @ w))
        return value, np.append(z.T @ pull + penalty * w, pull.sum())

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    return np.asarray(found.x[:-1] / deviation)


def choose_threshold(positive: Array, negative: Array, *, fpr: float) -> Gate:
    """The threshold for a false positive rate, from scores of held-out prompts.

    Args:
        positive, negative: `[n]`, `[m]`.
        fpr: between 0 and 1: at most so large is the rate that is expected.

    Raises:
        ConfigError: so small a rate cannot be promised from so few negatives.
    """
    if not 0 < fpr < 1:
        raise ConfigError(f"a false positive rate lies between 0 and 1, not at {fpr}")
    n, m = len(positive), len(negative)
    k = math.floor(fpr * (m + 1) + 1e-9)
    if k < 1 or not n:
        need, least = math.ceil(1 / fpr - 1e-9) - 1, math.ceil(1000 / (m + 1)) / 1000
        raise ConfigError(
            f"a false positive rate of {fpr:g} needs {need} held-out negative prompts and a positive one, and there "
            f"are {m} and {n}",
            fix=f"give more prompts, twice as many as are held out, or a rate of {least:g} or more",
        )
    # The next float32 up, as the library stores it: rounding down would let the k-th itself through.
    threshold = _up(float(np.sort(negative)[m - k]))
    hits = int((positive > threshold).sum())
    ends = beta.ppf([0.025, 0.975], k, m + 1 - k)
    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(0.975, hits + 1, n - hits))
    return Gate(
        threshold,
        Interval(np.asarray(k / (m + 1)), np.asarray(ends[0]), np.asarray(ends[1])),
        Interval(np.asarray(hits / n), np.asarray(low), np.asarray(high)),
    )


def make(
    positive: contrast.Rows, negative: contrast.Rows, *, fpr: float, seed: int = 0, penalty: float = PENALTY
) -> Probe:
    """Fit a probe on half of the prompts and judge it by the others, one of a family.

    Raises:
        ConfigError: there are too few prompts, or as `choose_threshold`.
    """
    a, b = contrast.split([positive, negative], share=HELD_OUT, seed=seed)
    w = fit(positive.x_ND[a.train], negative.x_ND[b.train], penalty=penalty)
    w = w.astype(np.float32).astype(np.float64)  # as it is stored, so that the threshold is of those very scores
    held_a, held_b = positive.x_ND[a.held_out] @ w, negative.x_ND[b.held_out] @ w
    gate = choose_threshold(held_a, held_b, fpr=fpr)
    sizes = [(len(x), len(y)) for x, y in ((a.train, b.train), (held_a, held_b))]
    return Probe(w, gate, auc_interval(held_a, held_b), roc(held_a, held_b), *sizes)


def write(
    target: Target,
    positive: Run,
    negative: Run,
    hook_point: str,
    *,
    fpr: float,
    seed: int = 0,
    penalty: float = PENALTY,
) -> Vector:
    """Write a probe for prompts like those of `positive`, against those of `negative`, as kind `probe`.

    Raises:
        ConfigError: the runs are of different models or hold no last rows of prompts, as `make`, or as `library.write`.
    """
    import torch

    model, digest = contrast.model_of([positive, negative])
    a, b = (contrast.rows_of(run, hook_point, phase="prefill", place="last") for run in (positive, negative))
    found = make(a, b, fpr=fpr, seed=seed, penalty=penalty)
    return library.write(
        target.folder,
        {library.VECTOR: torch.from_numpy(found.w), library.THRESHOLD: torch.tensor(found.gate.threshold)},
        overwrite=target.overwrite,
        name=target.name,
        kind="probe",
        hook_point=hook_point,
        model=model,
        model_weight_hash=digest,
        layer_mean_norm=contrast.mean_norm([a, b]),
        made_by={
            "command": "vector make probe",
            "inputs": {
                **contrast.inputs(positive, negative, a, b),
                "position": "last",
                "penalty": penalty,
                "asked_fpr": fpr,
            },
            "seeds": {"split": seed},
            "phase": "prefill",
        },
        evidence=told(found),
    )


def told(found: Probe) -> Mapping[str, Any]:
    """What held-out prompts say of a probe, for its card."""
    keep = np.unique(np.linspace(0, len(found.roc) - 1, _ROC_POINTS).round().astype(int))
    return {
        "threshold": found.gate.threshold,
        "false_positive_rate": contrast.interval_told(found.gate.fpr),
        "true_positive_rate": contrast.interval_told(found.gate.tpr),
        "held_out_auc": contrast.interval_told(found.auc),
        "train_prompts": list(found.train),
        "held_out_prompts": list(found.held_out),
        "roc": {name: found.roc[keep, i].tolist() for i, name in enumerate(("threshold", "fpr", "tpr"))},
    }


def _up(x: float) -> float:
    """The least float32 that is not below x."""
    near = np.float32(x)
    return float(near if float(near) >= x else np.nextafter(near, np.float32(np.inf)))
