"""Rows of the model at the positions after the border of reuse, compared: what a wrong entry changes inside the model.

The distance of two rows of one position is `|a - b| / |b|`, b the computed one; the distance of two requests at a hook
point is the median of that over the positions that both have. It needs no logarithm of a probability to move: a wrong
entry that changes no probability by more than rounding does may change rows by a thousand times what rounding does.

The rule is the gate's, for each hook point by itself: past `T = max(FACTOR_ROWS * max(Y, Y_i), least)` from *both* cold
twins, Y_i the distance of the two cold twins from each other, and Y the largest of these so far, none counted for more
than `SPREAD` times the middle one (`sglang_probe.gate.judge`). The factor is smaller than that of log-probabilities: a
median over positions of lengths over the width varies little from request to request.

`least` is there because a server may be exactly repeatable (Y = 0) and yet round differently at a border. Two
computations of one row that round every number independently are about `u * sqrt(2 * (layer + 1)) / 2` apart, u the
unit roundoff of the model's numbers: each layer adds two outputs to the residual stream, and each is rounded. `least`
is twice that (in fp32 the rounding within sums counts for more: `SUMS`). `docs/evidence/gate.md` has what was measured.
Numpy only.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sglang_probe.gate.judge import yardstick_of

Array = np.ndarray[Any, Any]
FACTOR_ROWS = 2.0
"""How much further apart than computed twins a request must be."""
ROUNDOFF = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8, "fp8_e4m3": 2**-4, "fp8_e5m2": 2**-3}
"""Unit roundoff, of the model's numbers or of coarser cached entries; of an unknown dtype bfloat16's."""
SUMS = 3e-5
"""Of a row's length: what sums in fp32 may differ by if they are added up in another order."""
LEAST_POSITIONS = 8
"""Of one hook point, with rows in both."""
MOST_POSITIONS = 64
"""After the border, whose rows are asked for: an answer of a server is bounded (`rows: {most_megabytes: ...}`)."""


class Held(NamedTuple):
    """Rows of one hook point."""

    position: Array
    """int64 `[n]`, ascending."""
    rows: Array
    """float32 `[n, width]`."""


Rows = Mapping[str, Held]
"""By hook point."""


@dataclass(frozen=True)
class Moved:
    """How far a request is from the nearer cold twin, at the hook point that says most."""

    hook_point: str
    """The first in the model that is past its threshold; where none is, the one that is nearest to it."""
    distance: float
    """Infinite where its rows are no numbers."""
    threshold: float
    positions: tuple[int, ...]
    """Those that are past the threshold by themselves."""

    @property
    def past(self) -> bool:
        """Whether it is past the threshold."""
        return self.distance > self.threshold


def distances(a: Held, b: Held) -> tuple[Array, Array]:
    """Positions that both have, int64 `[n]`, and the distance of a from b at each, `[n]`; infinite where a has no
    number and b has."""
    at, in_a, in_b = np.intersect1d(a.position, b.position, assume_unique=True, return_indices=True)
    one, other = a.rows[in_a].astype(np.float64), b.rows[in_b].astype(np.float64)
    known = np.isfinite(other).all(axis=1)
    at, one, other = at[known], one[known], other[known]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        apart = np.linalg.norm(one - other, axis=1)
        found = np.where(apart == 0, 0.0, apart / np.linalg.norm(other, axis=1))
    return at, np.where(np.isfinite(one).all(axis=1), found, np.inf)


class Floor:
    """What cold twins differ by at each hook point, so far.

    Args:
        dtype: of the model.
        cached: dtype of cached entries, as SGLang names it: a prompt that is computed whole may not read what was
            rounded to it.
    """

    def __init__(self, dtype: str | None, cached: str | None = None) -> None:
        unit = ROUNDOFF.get((dtype or "").removeprefix("torch."), ROUNDOFF["bfloat16"])
        self._unit = max(unit, ROUNDOFF.get(cached or "", 0.0))
        self._pairs: dict[str, list[float]] = {}  # ascending

    def add(self, colds: Sequence[Rows]) -> None:
        """Two cold twins of one request."""
        for name, own in _own(colds).items():
            bisect.insort(self._pairs.setdefault(name, []), own)

    def threshold(self, hook_point: str, own: float = 0.0) -> float:
        """T of a request whose own cold twins are so far apart."""
        least = max(self._unit * math.sqrt(max(2 * (_depth(hook_point)[0] + 1), 1)), SUMS)
        return max(FACTOR_ROWS * max(yardstick_of(self._pairs[hook_point]), own), least)

    def moved(self, one: Rows, colds: Sequence[Rows]) -> Moved | None:
        """How far a request is from the nearer of its cold twins; None: there is nothing to compare."""
        found = []
        for name, own in sorted(_own(colds).items(), key=lambda item: _depth(item[0])):
            if name not in one or not self._pairs.get(name):
                continue
            told = [distances(one[name], cold[name]) for cold in colds]
            if min(len(at) for at, _ in told) < LEAST_POSITIONS:
                continue
            at, apart = min(told, key=lambda t: float(np.median(t[1])))
            threshold = self.threshold(name, own)
            past = tuple(int(p) for p in at[apart > threshold])
            found.append(Moved(name, float(np.median(apart)), threshold, past))
        return next((m for m in found if m.past), max(found, key=lambda m: m.distance / m.threshold, default=None))


def _own(colds: Sequence[Rows]) -> dict[str, float]:
    """By hook point, how far two cold twins are apart."""
    one, other = colds
    found = {}
    for name in one.keys() & other.keys():
        at, apart = distances(one[name], other[name])
        if len(at) >= LEAST_POSITIONS and math.isfinite(own := float(np.median(apart))):
            found[name] = own
    return found


def _depth(hook_point: str) -> tuple[int, bool, str]:
    """Order in the model: the embedding, then each layer, in it the residual stream after it last."""
    layer = hook_point.split(".")[1] if hook_point.startswith("blocks.") else "-1"
    return int(layer) if layer.lstrip("-").isdigit() else -1, hook_point.endswith("resid_post"), hook_point
