"""What a CUDA graph does to the probe, on a CPU.

A model runs once under a dispatch mode that notes every operation with its tensors; a replay issues these operations
again on the same memory. Python, and so every hook, runs while it records, and never at replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH = 6
"""Of the rows that a graph is given."""


Note = tuple[Any, tuple[Any, ...], dict[str, Any], Any]
"""An operation, its arguments, and what it gave."""


class Noting(TorchDispatchMode):
    """Notes what runs."""

    def __init__(self, notes: list[Note]) -> None:
        super().__init__()
        self._notes = notes

    def __torch_dispatch__(self, op: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self._notes.append((op, args, kwargs or {}, out))
        return out


class Graph:
    """Operations of `run(x)` for one number of tokens, on the static input that a replay fills."""

    def __init__(self, run: Callable[[torch.Tensor], object], tokens: int) -> None:
        self.input = torch.zeros(tokens, WIDTH)
        self._notes: list[Note] = []
        self.python_runs = 0
        with Noting(self._notes):
            run(self.input)

    def replay(self, x: torch.Tensor) -> None:
        self.input.fill_(-1)  # padding rows hold something, too
        self.input[: len(x)] = x
        replay(self._notes)


def replay(notes: list[Note]) -> None:
    """Issue these operations again on the memory where they were."""
    for op, args, kwargs, recorded in notes:
        out = op(*args, **kwargs)
        if isinstance(recorded, torch.Tensor) and out is not recorded and out.data_ptr() != recorded.data_ptr():
            recorded.copy_(out)  # a graph writes its results where they were when it was captured
