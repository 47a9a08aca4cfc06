"""The rows of a forward pass that attend to a kept set, as the scheduler's side tells them to the attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_probe.kept_set import Kept


@dataclass(frozen=True)
class KeptRow:
    """A request of a forward pass that computes positions `[start, end)`, some of them past the end of its cache."""

    row: int
    """In the batch."""
    rid: str
    attempt: int
    kept: Kept
    start: int
    end: int


at_hand: Sequence[KeptRow] = ()
"""Rows of the forward being launched. Set by `instruments/kept_sets.py`, read by `attention.py`; both run on the
scheduler's thread."""
