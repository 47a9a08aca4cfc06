"""What a request asks of its own rows (`Ask.rows`), and the names of what the server keeps for it."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import numpy as np
from pydantic import Field, StrictInt, StrictStr, field_validator

from sglang_probe.config import Config

HANDLE = r"^[A-Za-z0-9_-]{22,128}$"
"""128 random bits at least: whoever knows a handle may read what is kept under it."""


class RowsAsk(Config):
    """Rows of the request's own positions, to be fetched after it ended: `GET /probe/rows/<handle>`."""

    handle: Annotated[StrictStr, Field(pattern=HANDLE)]
    """The name under which they are kept: 22 random letters or more that the client makes up and tells nobody, such as
    `secrets.token_urlsafe(24)`."""
    hook_points: tuple[StrictStr, ...] | None = Field(default=None, min_length=1, max_length=512)
    """Where in the model, among the hook points that the server records; by default all of these."""
    last: Annotated[StrictInt, Field(ge=1)] | None = None
    """How many positions, counted from the end. The last sampled token has no row and does not count."""
    windows: tuple[tuple[StrictInt, StrictInt], ...] | None = Field(default=None, min_length=1, max_length=64)
    """Ranges `[start, end]` of positions, counted over prompt and output. Without `last` and `windows`: all
    positions."""

    @field_validator("windows")
    @classmethod
    def _are_ranges(cls, ranges: tuple[tuple[int, int], ...] | None) -> tuple[tuple[int, int], ...] | None:
        for start, end in ranges or ():
            if not 0 <= start < end < 1 << 31:
                raise ValueError(f"[{start}, {end}] is no range of positions")
        return ranges

    def positions(self, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Which of `length` positions are asked for, ascending."""
        if self.last is None and self.windows is None:
            return np.arange(length)
        asked = np.zeros(length, dtype=bool)
        asked[length - min(self.last or 0, length) :] = True
        for start, end in self.windows or ():
            asked[start:end] = True
        return np.flatnonzero(asked)


def file_name(handle: str) -> str:
    """Of what is kept under a handle; the handle cannot be told from it."""
    return hashlib.blake2b(handle.encode(), digest_size=16).hexdigest()
