"""Content by position: main effects and interaction of a 2x2 design."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Value = Any
"""A number, or an array or column of numbers."""


@dataclass(frozen=True)
class Effects:
    """Effects on one outcome. With the identity as the same-same cell both main effects are partly a ceiling."""

    content: Value
    position: Value
    interaction: Value


def factorial_effects(*, ss: Value, ds: Value, sd: Value, dd: Value) -> Effects:
    """Effects from the four cells; the first letter is content, the second position; s same, d different.

    Use a second sampled continuation, not the true one itself, as the same content: cosine to itself is 1 by
    definition.
    """
    return Effects(((ss - ds) + (sd - dd)) / 2, ((ss - sd) + (ds - dd)) / 2, ss - ds - sd + dd)
