"""Axis `phase`: prefill, decode, or recomputation after a retraction.

The ledger names a phase only where something was computed. A position that was reused or dropped is `decode` if it lies
behind the prompt, else `prefill`: what computing it would have been.
"""

from __future__ import annotations

import numpy as np

from sglang_probe.axes.axis import UNKNOWN, Axis
from sglang_probe.axes.batch import Array, Batch

PREFILL, DECODE, RECOMPUTE = "prefill", "decode", "recompute"  # in the order of `run.columns.PHASES`
_COMPUTED_AS = 3


class Phase(Axis):
    """The phase of each position."""

    def __init__(self) -> None:
        super().__init__("phase", [PREFILL, DECODE, RECOMPUTE, UNKNOWN])

    def labels(self, batch: Batch) -> Array:
        """See `Axis`."""
        codes = batch.phase.astype(np.uint16)
        absent = codes >= _COMPUTED_AS
        if absent.any():
            known = batch.each(batch.prompt_len >= 0)
            codes[absent] = np.where(known[absent], batch.depth[absent] >= 0, _COMPUTED_AS)
        return codes
