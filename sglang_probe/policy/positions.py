"""RoPE positions that a request asks for, apart from where its tokens stand in the sequence.

`sampling_params.custom_params: {probe: {positions: {from: L, to: S}}}`: sequence position L + i is rotated as position
S + i. What a token can attend to is unchanged, so that position is manipulated and visibility is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from sglang_probe.config import Config, parse_config


class PositionOverride(Config):
    """Positions from `start` on are rotated as those from `to` on."""

    start: int = Field(alias="from", ge=1)
    """First sequence position that is moved; what lies before it may come from the prefix cache."""
    to: int = Field(ge=0)

    def moved(self, start: int, end: int) -> tuple[int, list[int]]:
        """Of sequence positions `[start, end)`: how many come before the override, and the RoPE positions of the
        rest."""
        first = min(max(start, self.start), end)
        return first - start, [p - self.start + self.to for p in range(first, end)]

    def last(self, length: int) -> int:
        """RoPE position of the last of `length` sequence positions."""
        return max(self.start - 1, length - 1 - self.start + self.to)


def override_of(custom_params: Any) -> PositionOverride | None:
    """What a request's `custom_params` ask for.

    Raises:
        ConfigError: it cannot be read.
    """
    probe = custom_params.get("probe") if isinstance(custom_params, Mapping) else None
    asked = probe.get("positions") if isinstance(probe, Mapping) else None
    if asked is None:
        return None
    data = dict(asked) if isinstance(asked, Mapping) else {"positions": asked}
    return parse_config(data, PositionOverride, where="custom_params.probe.positions")


def recorded_override(sampling_params: str) -> PositionOverride | None:
    """The override in column `sampling_params` of `run.requests()`."""
    return override_of(json.loads(sampling_params).get("custom_params"))
