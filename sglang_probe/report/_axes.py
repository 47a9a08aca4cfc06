"""Axes: the scale from values to coordinates, round ticks on linear and logarithmic axes, and their labels."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from sglang_probe.report._svg import Canvas, text_width
from sglang_probe.report.numbers import Kind


class Scale:
    """Maps values to coordinates. A scale of no extent puts everything at its middle."""

    def __init__(self, low: float, high: float, start: float, stop: float, log: bool = False) -> None:
        self._map: Callable[[float], float] = math.log10 if log else float
        self._low, self._high, self._start, self._stop = self._map(low), self._map(high), start, stop

    def __call__(self, value: float) -> float:
        if self._high == self._low:
            at = 0.5 if self._low else 0.0
        else:
            at = (self._map(value) - self._low) / (self._high - self._low)
        return self._start + at * (self._stop - self._start)


def round_ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round values, the first at or below `low`, the last at or above `high`; `whole`: integers only."""
    if high <= low:
        return [low]
    raw = (high - low) / max(count - 1, 1)
    raw = max(raw, 1.0) if whole else raw
    magnitude = 10.0 ** math.floor(math.log10(raw))
    multiples = (1, 2, 5, 10) if whole and magnitude < 10 else (1, 2, 2.5, 5, 10)
    step = next(m * magnitude for m in multiples if m * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def decades(low: float, high: float) -> tuple[float, float]:
    """The powers of ten around a range, at least one decade apart."""
    first = math.floor(math.log10(low))
    return 10.0**first, 10.0 ** max(math.ceil(math.log10(high)), first + 1)


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten inside [low, high], thinned to `count`; 1, 2 and 5 of each if the range is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1, max(1, math.ceil((last - first + 1) / count)))
    multiples = (1, 2, 5) if last - first <= 1 else (1,)
    return [t for p in powers for m in multiples if low * 0.999 <= (t := m * 10.0**p) <= high * 1.001] or [low]


def tick_labels(ticks: Sequence[float], kind: Kind) -> list[str]:
    """All in one notation, so that the ticks of an axis compare: with an exponent if any of them needs it."""
    if kind == "percent":
        return [f"{t * 100:.6g}%" for t in ticks]
    sizes = [abs(t) for t in ticks if t]
    if sizes and (max(sizes) >= 1e6 or min(sizes) < 1e-3):
        return [re.sub(r"(\.0)?e([+-])0?", r"e\2", f"{t:.1e}") if t else "0" for t in ticks]
    return [f"{t:,.0f}" if t.is_integer() else f"{t:.6g}" for t in map(float, ticks)]


def draw_ticks_below(c: Canvas, scale: Scale, ticks: Sequence[float], texts: Sequence[str], y: float) -> None:
    """Tick marks with labels under `y`; labels that would touch their left neighbour are left out."""
    taken = -math.inf
    for tick, text in zip(ticks, texts, strict=True):
        x, half = scale(tick), text_width(text, 11) / 2
        c.line(x, y, x, y + 4, "axis")
        x = min(x, c.width - half)
        if x - half > taken + 6:
            c.text(x, y + 17, text, "muted", "middle", 11)
            taken = x + half
