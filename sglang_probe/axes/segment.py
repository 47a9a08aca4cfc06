"""Axis `segment`: the part of the prompt that a token came from, as the workload named it. And the user's own labels.

A workload names segments by role or by the key `segment` of a message; the chat template's tokens are `template` and
`special`. Labels are character spans in the JSONL (`workload/jsonl.py`): an axis of the user's own.
"""

from __future__ import annotations

import numpy as np

from sglang_probe.axes.axis import UNKNOWN, Axis
from sglang_probe.axes.batch import SEGMENT, Array, Batch

GENERATED = "generated"
OTHER = "other"


class Segment(Axis):
    """Segments of the prompt, `generated` after it; `unknown` where a live recording lacks the prompt's length."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(SEGMENT, [*names, GENERATED, UNKNOWN])

    def labels(self, batch: Batch) -> Array:
        """See `Axis`."""
        generated, unknown = len(self.classes) - 2, len(self.classes) - 1
        codes = batch.paint(SEGMENT, unknown)
        gaps = codes == unknown
        if gaps.any():
            np.copyto(codes, np.uint16(generated), where=gaps & _after_the_prompt(batch))
        return codes


class Labelled(Axis):
    """An axis that the workload labelled by character spans; positions without a label are `other`."""

    def __init__(self, name: str, names: tuple[str, ...]) -> None:
        super().__init__(name, [*names, OTHER])

    def labels(self, batch: Batch) -> Array:
        """See `Axis`."""
        return batch.paint(self.name, len(self.classes) - 1).astype(np.uint16, copy=False)


def _after_the_prompt(batch: Batch) -> Array:
    """bool [N]: positions after the prompt; False where its length is unknown."""
    lengths = np.diff(batch.offsets)
    inside = np.where(batch.prompt_len >= 0, np.clip(batch.prompt_len - batch.begin, 0, lengths), lengths)
    parts = np.stack([inside, lengths - inside], axis=1).ravel()
    return np.repeat(np.tile(np.array([False, True]), len(lengths)), parts)
