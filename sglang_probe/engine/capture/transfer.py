"""Device memory on its way to the host, over a channel of somebody else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sglang_probe.errors import LedgerError


class Transfer:
    """One tensor. It is sent once, and read once its arrival was noted."""

    def __init__(self, on_device: torch.Tensor) -> None:
        self._on_device: torch.Tensor | None = on_device
        self._on_host: torch.Tensor | None = None
        self._arrived = False

    def send(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Enqueue the transfer. `copy` returns the host tensor at once; it is filled later."""
        assert self._on_device is not None
        self._on_host = copy(self._on_device)
        self._on_device = None

    def arrive(self) -> None:
        """Note that the transfer was waited for."""
        self._arrived = self._on_host is not None

    def wait(self) -> None:
        """Fetch the tensor at once if it has not arrived. Waits for the device: only for a recording that closes."""
        if not self._arrived:
            source = self._on_device if self._on_device is not None else self._on_host
            assert source is not None
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            self._on_host, self._on_device = source.to("cpu"), None
            self.arrive()

    @property
    def host(self) -> torch.Tensor:
        """In host memory that nothing else writes.

        Raises:
            LedgerError: it has not arrived.
        """
        if not self._arrived or self._on_host is None:
            raise LedgerError("what a forward measured had not arrived on the host when its result was processed")
        return self._on_host


def upload(x: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """A copy on the device, enqueued: from pinned memory, so that the host does not wait."""
    host = torch.tensor(x)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
