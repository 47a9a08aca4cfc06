"""Interventions that a replayed graph makes: the same operations whatever the batch, and one buffer that says what.

Python does not run at replay, so a layer's hook records its passes once, over every row of the captured shape: which
vector, which operation and how much is read from memory that stays. The host fills it before each forward by one copy
from pinned memory, enqueued on the forward's stream. A row that nobody changes names vector 0, whose change is 0, and
keeps its bits; so does padding.

Shapes: Y layers, P passes, N rows of the buffer; 4 numbers a row: vector, operation, amount (the bits of a float32),
gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sglang_probe.engine.capture.transfer import upload
from sglang_probe.errors import LedgerError
from sglang_probe.steering.apply import SPLICE, Bank, change
from sglang_probe.steering.plan import Rows


class GraphSteering:
    """Buffers of one model.

    Args:
        layers: that have a hook, ascending.
        passes: over each of them; interventions that need more cannot be made.
        capacity: rows; at least the largest shape that a graph is captured for. A larger eager forward gets memory of
            its own.
        recording: whether the running operations are being recorded into a graph.
        fused: one kernel a layer (`steering_kernel`) in place of PyTorch's operations.
    """

    def __init__(
        self,
        bank: Bank,
        layers: Sequence[int],
        *,
        passes: int,
        capacity: int,
        device: torch.device | str,
        recording: Callable[[], bool] = lambda: False,
        fused: bool = False,
    ) -> None:
        self._bank = bank
        self._fused: Callable[[Tensor, Tensor, Tensor, Bank], None] | None = None
        if fused:
            from sglang_probe.engine.capture.steering_kernel import apply_rows

            self._fused = apply_rows
        self._place = {layer: i for i, layer in enumerate(layers)}
        self.passes = passes
        self.buffer_YP4N = torch.zeros((len(layers), passes, 4, capacity), dtype=torch.int32, device=device)
        self._large: Tensor | None = None
        self._empty = True
        self._recording = recording

    def load(self, plan: Mapping[int, Sequence[Rows]], tokens: int) -> None:
        """What the coming forward of so many rows changes, by layer. Enqueued before it, on its stream.

        Raises:
            LedgerError: a layer has more passes than were recorded.
        """
        capacity = self.buffer_YP4N.shape[-1]
        self._large = None
        if not plan and self._empty and tokens <= capacity:
            return
        numbers_YP4N = np.zeros((*self.buffer_YP4N.shape[:3], max(tokens, capacity)), dtype=np.int32)
        for layer, passes in plan.items():
            if any((p.op == SPLICE).any() for p in passes):
                raise LedgerError(f"layer {layer} is to be spliced, and that is not recorded into graphs")
            if len(passes) > self.passes:
                raise LedgerError(f"layer {layer} has {len(passes)} passes, and {self.passes} are recorded")
            for k, p in enumerate(passes):
                told = numbers_YP4N[self._place[layer], k]
                told[0, p.row], told[1, p.row], told[3, p.row] = p.vector, p.op, p.gated
                told[2, p.row] = p.amount.view(np.int32)
        device = self.buffer_YP4N.device
        if tokens > capacity:
            self._large = upload(numbers_YP4N, device)
            return
        self.buffer_YP4N.copy_(upload(numbers_YP4N, device), non_blocking=True)
        self._empty = not plan

    def apply(self, layer: int, x_ND: Tensor, to_ND: Tensor) -> None:
        """Change the rows of a layer, in place. Only here does the probe put an operation of it into a graph.

        Args:
            x_ND: the residual stream after the layer. to_ND: the tensor to which the change is added.

        Raises:
            LedgerError: a graph is larger than the buffer, or a forward than what was loaded for it.
        """
        n = len(x_ND)
        buffer = self.buffer_YP4N if self._large is None else self._large
        if n > buffer.shape[-1]:
            if self._recording() or self._large is not None:
                raise LedgerError(f"a forward of {n} rows; interventions have room for {buffer.shape[-1]}")
            return  # of no request: nothing was loaded for it
        if self._fused is not None:
            self._fused(x_ND, to_ND, buffer[self._place[layer], :, :, :n], self._bank)
            return
        total_ND = torch.zeros_like(x_ND, dtype=torch.float32)
        for told_4N in buffer[self._place[layer], :, :, :n]:
            vector, op, amount, gated = told_4N
            total_ND += change(x_ND.float() + total_ND, vector, op, amount.view(torch.float32), gated != 0, self._bank)
        rounded = total_ND.to(to_ND.dtype)
        to_ND.copy_(torch.where(rounded != 0, to_ND + rounded, to_ND))
