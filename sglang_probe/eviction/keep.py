"""From what a policy selected to a kept set that an engine can serve with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.base import Selection
from sglang_probe.kept_set import Kept


def kept_of(selections: Sequence[Selection], *, lead: int = 0) -> Kept:
    """The kept set of one request from what a policy selected in each of its layers, in order of the layers.

    A single Selection whose tensors have the layers as leading axis (from a stack of layers) will do as well.

    Args:
        lead: positions after the cache before the first selected step, for a selection that changes by step: the
            question of a query-hidden protocol but its last token (`Queries.skip`). They read what the first step does.

    Raises:
        ProbeError: layers differ in positions, heads or steps.
    """
    keeps = [s.keep_TGL for s in selections]
    if len({k.shape for k in keeps}) != 1:
        raise ProbeError(f"layers differ in what they select from: {sorted({tuple(k.shape) for k in keeps})}")
    keep = keeps[0] if len(keeps) == 1 and keeps[0].ndim == 4 else torch.stack(keeps)
    keep = keep.movedim(0, 1)
    if len(keep) > 1 and lead:
        keep = torch.cat([keep[:1].expand(lead, *keep.shape[1:]), keep])
    return Kept(keep)
