"""Who is decoded beside whom."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import Field

from sglang_probe.config import Config

T = TypeVar("T")


class Partners(Config):
    """Requests are served in groups, each admitted at once and awaited before the next."""

    count: int = Field(ge=0)
    """Partners of each request: 0 serves it alone, 7 in groups of 8."""
    draw: Literal["fixed", "random"] = "fixed"
    """`fixed`: the same group in every replicate, groups in shuffled order. `random`: new groups in every replicate."""


def group(requests: Sequence[T], partners: Partners, order_seed: int | None) -> list[list[T]]:
    """Requests in groups, in submission order.

    Args:
        order_seed: of the replicate; None leaves workload order.
    """
    size = partners.count + 1
    queue = list(requests)
    rng = random.Random(order_seed)
    if order_seed is not None and partners.draw == "random":
        rng.shuffle(queue)
    groups = [queue[i : i + size] for i in range(0, len(queue), size)]
    if order_seed is not None and partners.draw == "fixed":
        rng.shuffle(groups)
    return groups
