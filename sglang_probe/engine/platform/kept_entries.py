"""Keys and values that each kv head reads, copied out of the pool once and added to by every decode step.

A gather of all columns at every step costs as much as the attention itself. An entry of the pool does not change while
a request uses it, so that the copies stay good until the batch changes. Shapes as in `kept_slots.py`, D head dim, P
entries of the pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_probe.engine.platform.kept_slots import KeptSlots


class KeptEntries:
    """The copies of one batch composition, layer by layer."""

    def __init__(self, slots: KeptSlots, dtype: torch.dtype) -> None:
        self.slots = slots
        self._dtype = dtype
        self._layers: dict[int, tuple[int, Tensor, Tensor]] = {}

    def of_layer(self, layer: int, k_PGD: Tensor, v_PGD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values `[B, G, J, D]` of this step, and the bias `[B, G, J]` of padding (None: there is none)."""
        slots = self.slots
        step, k_BGJD, v_BGJD = self._layers.get(layer, (-1, None, None))
        if k_BGJD is None or v_BGJD is None or step < slots.step - 1:
            k_BGJD, v_BGJD = (self._gathered(layer, pool) for pool in (k_PGD, v_PGD))
        elif step < slots.step:
            for copies, pool in ((k_BGJD, k_PGD), (v_BGJD, v_PGD)):
                self._add_newest(layer, copies, pool)
        self._layers[layer] = (slots.step, k_BGJD, v_BGJD)
        end = slots.end
        return k_BGJD[:, :, :end], v_BGJD[:, :, :end], slots.bias(layer)

    def _gathered(self, layer: int, pool_PGD: Tensor) -> Tensor:
        entry_BGJ = self.slots.entry[layer]
        # Columns to come are zero, not empty: a bias of -inf does not cover NaN.
        copies = torch.zeros(*entry_BGJ.shape, pool_PGD.shape[-1], dtype=self._dtype)
        copies[:, :, : self.slots.end] = _entries(pool_PGD, entry_BGJ[:, :, : self.slots.end])
        return copies

    def _add_newest(self, layer: int, copies_BGJD: Tensor, pool_PGD: Tensor) -> None:
        slots = self.slots
        entry_BGJ = slots.entry[layer]
        request = torch.arange(len(entry_BGJ))
        copies_BGJD[request, :, slots.newest_B] = _entries(pool_PGD, entry_BGJ[request, :, slots.newest_B]).to(
            self._dtype
        )
        for i in slots.changing:
            copies_BGJD[i, :, : slots.width] = _entries(pool_PGD, entry_BGJ[i, :, : slots.width]).to(self._dtype)


def _entries(pool_PGD: Tensor, entry: Tensor) -> Tensor:
    dim = pool_PGD.shape[-1]
    return pool_PGD.reshape(-1, dim).index_select(0, entry.reshape(-1)).view(*entry.shape, dim)
