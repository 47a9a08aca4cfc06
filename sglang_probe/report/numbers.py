"""Numbers as text: one format for each kind of quantity, on every page and on the terminal.

A printed number never claims more than it is: `100%` and `0%` appear only for exact values (99.97 % reads `>99.9%`),
a small number that would round to zero turns scientific, and a fraction asked to be an integer keeps its fraction.
"""

from __future__ import annotations

import math
import numbers
from typing import Literal

import numpy as np
import pandas as pd

Kind = Literal[
    "auto",
    "average",
    "correlation",
    "decimal",
    "integer",
    "log2",
    "percent",
    "points",
    "rate",
    "scientific",
    "seconds",
    "signed",
    "text",
    "times",
]
"""What a number is.

`percent`: a share, given as a fraction. `scientific`: a distance, such as relative L2 (`4.20e-7`, as on axes).
`integer`: a count, thousands separated. `average`: a mean of counts. `seconds`. `rate`: something per second. `times`:
a quotient of two times. `decimal`: a cosine, a divergence, an area. `signed`: a difference of such numbers.
`correlation`, `log2` (of a ratio), `points` (a difference of shares, in percentage points): signed. `auto`: four
significant digits, scientific below 0.001. `text`: no separators, for ids.
"""

PLACES: dict[Kind, int] = {
    "average": 1,
    "correlation": 2,
    "decimal": 3,
    "log2": 2,
    "percent": 1,
    "points": 1,
    "rate": 0,
    "scientific": 2,
    "seconds": 1,
    "signed": 3,
    "times": 2,
}
"""Places after the point (of a share: of its percentage)."""

_SIGNED = ("correlation", "log2", "points", "signed")

MISSING = "\N{EN DASH}"

_EXACT = 1e-12  # a mean of ones may miss 1.0 by rounding; closer than this counts as exact


def format_number(x: object, kind: Kind = "auto", *, digits: int | None = None) -> str:
    """`x` as text.

    Args:
        x: a number; missing values (None, NaN, NA) give an en dash, text is returned as it is.
        kind: what the number is.
        digits: places after the point, instead of those of the kind; for drawings, where room is short.
    """
    if is_missing(x):
        return MISSING
    if isinstance(x, bool | np.bool_):
        return "yes" if x else "no"
    if kind == "text" or not isinstance(x, numbers.Real):
        return str(x)
    value = float(x)
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if kind in PLACES:
        places = PLACES[kind] if digits is None else digits
        if kind == "percent":
            return _percent(value, places)
        return _scientific(value, places) if kind == "scientific" else _fixed(value, places, kind in _SIGNED)
    if isinstance(x, numbers.Integral):
        return f"{int(x):,}"
    if value.is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if not 1e-3 <= abs(value) < 1e7:
        return _scientific(value, 2)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_interval(low: object, high: object, kind: Kind = "auto") -> str:
    """`[low, high]`, or an en dash if one of them is missing."""
    if is_missing(low) or is_missing(high):
        return MISSING
    return f"[{format_number(low, kind)}, {format_number(high, kind)}]"


def is_missing(x: object) -> bool:
    """None, NaN, NaT or NA."""
    return x is None or x is pd.NA or x is pd.NaT or (isinstance(x, numbers.Real) and math.isnan(float(x)))


def _fixed(value: float, places: int, signed: bool) -> str:
    text = f"{value:{'+' if signed else ''},.{places}f}"
    if not _is_zero(text):
        return text
    if value and signed:
        return text  # its sign is what an interval is read for
    return _scientific(value, 2) if value and places else f"{0:.{places}f}"


def _percent(value: float, digits: int) -> str:
    for exact in (0.0, 1.0):
        if abs(value - exact) < _EXACT * exact or value == exact:
            return f"{exact:.0%}"
    text = f"{value * 100:,.{digits}f}"
    step = 10.0**-digits
    if _is_zero(text):
        return f"<{step:.{digits}f}%" if value > 0 else f">-{step:.{digits}f}%"
    if text == f"{100:.{digits}f}":
        return f">{100 - step:.{digits}f}%" if value < 1 else ">100%"
    return f"{text}%"


def _scientific(value: float, digits: int) -> str:
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _is_zero(text: str) -> bool:
    return not text.strip("+-0.,")
