"""Which KV entries each kv head reads in a decode step, kept from step to step for a batch of evicted requests.

An entry is a slot and a head, numbered `slot * G + g`. Columns are the kept positions, padded to the longest head of
the batch, and after them the positions after the cache, which all heads and layers share: a step adds one column.
Shapes: Y layers, B requests, G kv heads, J columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_probe.engine.platform.kept_rows import KeptRow
from sglang_probe.kept_set import Kept

_ROOM = 64
"""Steps for which columns are set aside at once."""


class KeptSlots:
    """Entries and padding of one batch composition; `advance` makes them those of the next step."""

    def __init__(
        self,
        rows: Sequence[KeptRow],
        slots: Sequence[Tensor],
        dtype: torch.dtype,
        previous: KeptSlots | None = None,
    ) -> None:
        """`slots[i]` are the KV slots of positions `[0, end)` of `rows[i]`, whose query is the last of them.

        What `previous` knows of the same requests is taken over.
        """
        self._requests = [_identity(r) for r in rows]
        self._cache = [s[: r.kept.length].clone() for r, s in zip(rows, slots, strict=True)]
        self._kept = [r.kept for r in rows]  # so that no other set takes the identity of one of these
        self.changing = [i for i, r in enumerate(rows) if len(r.kept.keep_SYGN) > 1]
        """Requests whose kept set is another at every step."""
        self.step = 0
        """Steps since these columns were made."""
        layers, heads = self._kept[0].heads
        self._head = torch.arange(heads)
        counts = [k.counts_SYG for k in self._kept]
        widths = [int(c.max()) for c in counts]
        self.width = max(widths)
        """Columns of kept positions; those after the cache follow."""
        longest = max(r.end - r.kept.length for r in rows)
        self._capacity = longest + _ROOM
        shape = (layers, len(rows), heads, self.width + self._capacity)
        self.entry = torch.zeros(shape, dtype=torch.int64)
        """`[Y, B, G, J]`; any entry where a column is padding, or still to come."""
        self._bias = torch.full(shape, -torch.inf, dtype=dtype)
        self._steps = [0] * len(rows)
        self._uneven = any(int(c.min()) < self.width for c in counts)
        known = {} if previous is None else {r: j for j, r in enumerate(previous._requests)}
        for i, (row, slot) in enumerate(zip(rows, slots, strict=True)):
            j = known.get(_identity(row))
            # A client may use a request id again, so that the slots themselves are compared.
            if (
                previous is None
                or j is None
                or i in self.changing
                or not torch.equal(previous._cache[j], self._cache[i])
            ):
                self._keep(i, row.kept, row.end - 1, slot)
            else:
                self.entry[:, i, :, : widths[i]] = previous.entry[:, j, :, : widths[i]]
                self._bias[:, i, :, : widths[i]] = previous._bias[:, j, :, : widths[i]]
            self._add(i, slot[row.kept.length :])

    def advance(self, rows: Sequence[KeptRow], slots: Sequence[Tensor]) -> bool:
        """Go on by one position per request. False if these are not the next positions of the same requests."""
        if [_identity(r) for r in rows] != self._requests:
            return False
        steps = [r.end - r.kept.length for r in rows]
        if any(new != old + 1 for new, old in zip(steps, self._steps, strict=True)) or max(steps) > self._capacity:
            return False
        for i in self.changing:
            self._keep(i, rows[i].kept, rows[i].end - 1, slots[i])
        self._add_one(torch.stack([s[-1] for s in slots]))
        return True

    @property
    def end(self) -> int:
        """Columns in use."""
        return self.width + max(self._steps)

    @property
    def newest_B(self) -> Tensor:
        """The column of each request's own position."""
        return self.width - 1 + torch.tensor(self._steps)

    def bias(self, layer: int) -> Tensor | None:
        """What is added to the logits, `[B, G, J]`: `-inf` at padding. None if no column is padding."""
        padded = self._uneven or len(set(self._steps)) > 1
        return self._bias[layer, :, :, : self.end] if padded else None

    def _keep(self, i: int, kept: Kept, position: int, slots: Tensor) -> None:
        """Columns of the kept positions: of each head in order of position, then padding."""
        keep_YGN = kept.at(position)
        order = (~keep_YGN).to(torch.uint8).sort(stable=True, dim=-1).indices[..., : self.width]
        used = torch.arange(order.shape[-1]) < keep_YGN.sum(-1, keepdim=True)
        entries = slots.to(torch.int64)[order] * len(self._head) + self._head[:, None]
        width = order.shape[-1]
        self.entry[:, i, :, :width] = entries.where(used, 0)
        self._bias[:, i, :, :width] = torch.zeros(used.shape, dtype=self._bias.dtype).masked_fill(~used, -torch.inf)

    def _add(self, i: int, slots: Tensor) -> None:
        first = self.width
        self.entry[:, i, :, first : first + len(slots)] = slots.to(torch.int64) * len(self._head) + self._head[:, None]
        self._bias[:, i, :, first : first + len(slots)] = 0
        self._steps[i] = len(slots)

    def _add_one(self, slots_B: Tensor) -> None:
        self._steps = [s + 1 for s in self._steps]
        self.step += 1
        request, column = torch.arange(len(slots_B)), self.newest_B
        entry_BG = slots_B.to(torch.int64)[:, None] * len(self._head) + self._head
        self.entry[:, request, :, column] = entry_BG[:, None]
        self._bias[:, request, :, column] = 0


def _identity(row: KeptRow) -> tuple[str, int, int]:
    """The next recording of an engine may use a request id again, but never a set of this one."""
    return row.rid, row.attempt, id(row.kept)
