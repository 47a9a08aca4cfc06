"""Alarms with a stated rate of false ones, from ranks alone: nothing is assumed of how scores are distributed.

A *trajectory* is one request with one score per statistic; a larger score is more unusual. What is assumed is that the
trajectories of the reference and those of the stream are exchangeable while nothing has changed: of the same kind of
traffic, none derived from another.

Sources: split conformal p-values, Vovk, Gammerman and Shafer (2005); calibrators from p-values to e-values, Vovk and
Wang (2021); e-detectors, Shin, Ramdas and Rinaldo (2203.03532).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

EXPONENTS = np.arange(1, 10) / 10
"""Of the calibrators `k p^(k-1)`, whose mean is one too: small exponents react to rare extremes, large ones to many
moderate scores."""


def p_values(scores: Array, reference: Array) -> Array:
    """Split conformal p-value of each score, of the shape of `scores`: `(1 + #{reference >= score}) / (n + 1)`.

    An alarm at `p <= a` is false for a share of at most a of all trajectories. It cannot come at all where a is below
    `1 / (n + 1)`. A score that is not a number has p-value 1.

    Args:
        reference: scores of n trajectories that nothing was fitted to.
    """
    ordered = np.sort(np.asarray(reference, dtype=np.float64))
    scores = np.asarray(scores, dtype=np.float64)
    above = len(ordered) - np.searchsorted(ordered, scores, side="left")
    return np.where(np.isnan(scores), 1.0, (1 + above) / (len(ordered) + 1))


def sequential_p_values(stream_ST: Array, reference_SN: Array) -> Array:
    """Conformal p-value of each trajectory of S streams against the reference **and all earlier ones of its stream**,
    `[S, T]`.

    Against a fixed reference the p-values of one stream would depend on each other through it: where it happens to lie
    low, all of them are small, and no rate of a detector that adds up their evidence can be stated. Against everything
    that came before, they are (up to ties, which make them larger) independent and uniform, whatever the size of the
    reference. The price: a shift that goes unnoticed for as long as the reference is becomes part of it.
    """
    stream, reference = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (stream_ST, reference_SN))
    (streams, length), n = stream.shape, reference.shape[1]
    earlier = np.concatenate([np.broadcast_to(reference, (streams, n)), stream], axis=1)
    out = np.empty((streams, length))
    for t in range(length):
        above = (earlier[:, : n + t] >= stream[:, t, None]).sum(1)
        out[:, t] = np.where(np.isnan(stream[:, t]), 1.0, (1 + above) / (n + t + 1))
    return out


def e_values(p: Array) -> Array:
    """Evidence against "nothing unusual", of the shape of `p`: the mean of `k p^(k-1)` over `EXPONENTS`. Its expected
    value is at most 1 while p-values are valid."""
    p = np.asarray(p, dtype=np.float64)
    return np.asarray(sum(k * p ** (k - 1) for k in EXPONENTS) / len(EXPONENTS))


def shiryaev_roberts(e_ST: Array) -> Array:
    """The e-detector `R_t = (R_{t-1} + 1) e_t` after each trajectory, `[S, T]`.

    While nothing has changed, `R_t - t` does not rise on average. So an alarm at `R_t >= 1 / a` comes falsely within T
    trajectories with a chance of at most `a T`, and after `1 / a` of them at the earliest on average.
    """
    e = np.atleast_2d(np.asarray(e_ST, dtype=np.float64))
    out, now = np.empty_like(e), np.zeros(len(e))
    for t in range(e.shape[1]):
        # An alarm long past says nothing more by growing until it overflows.
        now = np.minimum((now + 1) * e[:, t], 1e300)
        out[:, t] = now
    return out


def first_alarm(detector_ST: Array, rate: float) -> Array:
    """Number, from 0, of the trajectory at which each stream alarms, int `[S]`; -1: it does not."""
    passed = detector_ST >= 1 / rate
    return np.where(passed.any(1), passed.argmax(1), -1)
