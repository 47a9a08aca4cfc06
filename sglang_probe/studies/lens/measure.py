"""What a prediction after some layer says: how sure it is, how far from the final one, where the target stands.

The lens (nostalgebraist 2020) is final norm and unembedding on the residual stream after any layer. After early layers
the stream is not yet in the basis that these read, so that they may say little about what the layer "thinks": Belrose
et al. (2303.08112) show how biased they are. Numbers of different layers share a scale, not a meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Reading:
    """N predictions after one layer."""

    entropy: Array
    """Of the next-token distribution, nats, `[N]`."""
    kl: Array
    """`KL(final || this layer)`, nats `[N]`; NaN without a final distribution."""
    rank: Array
    """Of the target, from 1: tokens that are likelier, plus 1; `[N]`, NaN where there is no target."""
    other_rank: Array
    """The same of the target of another position: what a rank owes to the target being a frequent token."""
    log_likelihood: Array
    """Of the target, nats `[N]`; NaN as above."""
    top: Array
    """The most likely token, int64 `[N]`."""
    probability: Array
    """Of it, `[N]`."""
    plain_kl: Array
    """`kl` by the plain lens where a tuned one reads; else the same as `kl`."""


def read(logits_NV: Tensor, target_N: Array, other_N: Array, final_NV: Tensor | None = None) -> Reading:
    """Read predictions.

    Args:
        target_N: token ids; -1: none.
        other_N: token ids of other positions, for `other_rank`; -1: none.
        final_NV: logits of the model's last layer; None where it was not captured.
    """
    log = torch.log_softmax(logits_NV.float(), -1)
    p = log.exp()
    entropy = -(p * log).sum(-1)
    nothing = np.full(len(log), np.nan)
    divergence = nothing if final_NV is None else kl(log, final_NV)
    best = p.max(-1)
    return Reading(
        entropy.numpy(),
        divergence,
        _rank(log, target_N),
        _rank(log, other_N),
        _chosen(log, target_N),
        best.indices.numpy(),
        best.values.numpy(),
        divergence,
    )


def kl(logits_NV: Tensor, final_NV: Tensor) -> Array:
    """`KL(final || logits)` of each row, nats `[N]`; logits need not be normalised."""
    log, final = (torch.log_softmax(x.float(), -1) for x in (logits_NV, final_NV))
    # Rounding leaves a layer that is the last one a hair below 0.
    found: Array = (final.exp() * (final - log)).sum(-1).clamp(min=0).numpy()
    return found


def _chosen(log_NV: Tensor, target_N: Array) -> Array:
    at = torch.from_numpy(np.maximum(target_N, 0).astype(np.int64))[:, None]
    return np.where(target_N >= 0, log_NV.gather(-1, at)[:, 0].numpy(), np.nan)


def _rank(log_NV: Tensor, target_N: Array) -> Array:
    at = torch.from_numpy(np.maximum(target_N, 0).astype(np.int64))[:, None]
    above = (log_NV > log_NV.gather(-1, at)).sum(-1).numpy()
    return np.where(target_N >= 0, above + 1.0, np.nan)


def settled(agrees_LN: Array) -> Array:
    """First of L layers from which on, to the last, the most likely token is the final one; `[N]`, int64, from 0; L
    where not even the last agrees."""
    fails = ~np.asarray(agrees_LN, dtype=bool)
    layers = len(fails)
    last_failure = layers - 1 - np.argmax(fails[::-1], axis=0)
    return np.where(fails.any(0), last_failure + 1, 0)
