"""Threads of a forward pass on the CPU: several for a long prefill, one for everything else.

A decode step is too short for several (`environment.py` has the measurement), and a prefill of thousands of tokens is
little but products of large matrices: with one thread the other cores of a machine idle meanwhile. How many compute
does not change a bit of the rows (`tests/engine/platform/test_threads.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from sglang_probe.engine.platform.environment import PREFILL_THREADS

LEAST_TOKENS = 256
"""Of a forward, for it to be a long one."""


class ForwardThreads:
    """Of this process, which begins with as many as `OMP_NUM_THREADS` says."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self._few = torch.get_num_threads()
        allowed = len(os.sched_getaffinity(0))
        self._many = max(self._few, min(int(env.get(PREFILL_THREADS) or self._few), allowed))

    def choose(self, forward_batch: Any) -> None:
        """Set them for a forward that is about to begin; costs nothing where they stay as they are."""
        if self._many == self._few:
            return
        long = not forward_batch.forward_mode.is_decode() and len(forward_batch.input_ids) >= LEAST_TOKENS
        wanted = self._many if long else self._few
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
