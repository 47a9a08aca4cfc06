"""Taps: one preallocated buffer per hook point, written by a copy inside the forward pass.

A copy into a fixed buffer is what a replayed graph can contain (Python does not run at replay), and it protects
against fused kernels that later overwrite the tensor. The CPU path uses the same code.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sglang_probe.errors import LedgerError


class Tap:
    """The buffer `[capacity, width]` of one hook point, on the model's device, in the model's dtype.

    Args:
        columns: what is taken of a row, ascending; None: all.
        weights_DK: write `x @ w` in fp32 instead of the row; None: the row.
    """

    def __init__(
        self, hook_point: str, columns: torch.Tensor | None = None, weights_DK: torch.Tensor | None = None
    ) -> None:
        self.hook_point = hook_point
        self._columns = columns
        self._weights_DK = weights_DK
        self.buffer: torch.Tensor | None = None
        self.written = -1

    def write(self, x_ND: torch.Tensor, capacity: int) -> None:
        """Copy `x_ND` to the head of the buffer. Only here may a recorded graph touch the probe."""
        if self._columns is not None:
            self._columns = self._columns.to(x_ND.device)
            x_ND = x_ND.index_select(1, self._columns)
        if self._weights_DK is not None:
            self._weights_DK = self._weights_DK.to(x_ND.device)
            x_ND = x_ND.float() @ self._weights_DK
        n, width = x_ND.shape
        if self.buffer is None or self.buffer.shape[0] < n:
            self.buffer = torch.empty((max(n, capacity), width), dtype=x_ND.dtype, device=x_ND.device)
        self.buffer[:n].copy_(x_ND)
        self.written = n


def head_columns(heads: list[int], head_dim: int) -> torch.Tensor:
    """Columns of a flat row that belong to these heads, int64 `[len(heads) * head_dim]`."""
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


class Taps:
    """All taps of one model.

    Args:
        hook_points: names in capture order.
        capacity: rows to reserve at first use; a larger eager forward grows the buffer.
        columns: of hook points that hold some heads only, the columns of these.
        weights: of hook points that hold scores, the vectors that rows are multiplied with, float32 `[d, k]`.
    """

    def __init__(
        self,
        hook_points: list[str],
        capacity: int,
        columns: Mapping[str, torch.Tensor] | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._taps = {h: Tap(h, (columns or {}).get(h), (weights or {}).get(h)) for h in hook_points}
        self._capacity = capacity

    def __getitem__(self, hook_point: str) -> Tap:
        return self._taps[hook_point]

    def write(self, hook_point: str, x_ND: torch.Tensor) -> None:
        self._taps[hook_point].write(x_ND, self._capacity)

    def arm(self) -> None:
        """Forget what was written, so that a tap that does not fire in the coming forward is noticed."""
        for tap in self._taps.values():
            tap.written = -1

    def take(
        self, tokens: int, *, replayed: bool, selected: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, torch.Tensor]:
        """Rows `[tokens, width]` of the forward that just ran, as host tensors of their own.

        Args:
            selected: of hook points that do not hold every token, those to take, ascending; one without any is left
                out.

        Raises:
            LedgerError: a tap did not fire, or fired with another number of rows than the ledger expects. At replay
                only the capacity can be checked, because rows after the real batch are padding.
        """
        rows = {}
        chosen: dict[int, torch.Tensor] = {}
        for tap in self._taps.values():
            if tap.buffer is None or tap.buffer.shape[0] < tokens or (not replayed and tap.written != tokens):
                raise LedgerError(
                    f"hook point {tap.hook_point} saw {max(tap.written, 0)} rows in a forward of {tokens} tokens"
                )
            # A copy, not a view: the next forward overwrites the buffer before the writer has seen this one.
            some = None if selected is None else selected.get(tap.hook_point)
            if some is None or len(some) == tokens:
                rows[tap.hook_point] = tap.buffer[:tokens].to("cpu", copy=True)
            elif len(some):
                if id(some) not in chosen:  # most hook points share theirs
                    chosen[id(some)] = torch.from_numpy(some).to(tap.buffer.device)
                rows[tap.hook_point] = tap.buffer.index_select(0, chosen[id(some)]).to("cpu")
        return rows
