"""RoPE positions that a request asks for, apart from where its tokens stand in the sequence (`Ask.positions`).

Positions of a forward pass are built from the host's lists in `ForwardBatch.init_new` and read by nothing but the
rotation, so that replacing them there leaves KV slots, masks and the ledger alone. Keys of such a request are not those
of its tokens at their places: it neither reuses moved positions from the tree nor publishes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.base import Instrument
from sglang_probe.engine.releases.base import Hook, Release

if TYPE_CHECKING:
    from sglang_probe.engine.ledger.facts import ForwardPlan

_BATCH = "sglang.srt.model_executor.forward_batch_info.ForwardBatch"


class Positions(Instrument):
    """See the module."""

    name = "positions"
    field = "positions"
    one_rank = True
    features = ("bypass", "positions")
    rows: tuple[list[int], list[int]] | None = None
    """Token rows of the forward that was launched last, and the positions by which they are rotated."""

    @classmethod
    def hooks(cls, release: Release) -> list[Hook]:
        return [*release.bypass_hooks(), (f"{_BATCH}.init_new", init_new, "AFTER")]

    def read_limit(self, ask: Ask, req: Any) -> int | None:
        return None if ask.positions is None else ask.positions.start

    def launch(self, reqs: Sequence[Any], asks: Sequence[Ask], plan: ForwardPlan) -> None:
        self.rows = moved_positions(asks, plan)

    def drop(self) -> None:
        self.rows = None


def moved_positions(asks: Sequence[Ask], plan: ForwardPlan) -> tuple[list[int], list[int]] | None:
    """Rows of this forward whose RoPE position is prescribed, and the positions."""
    rows: list[int] = []
    positions: list[int] = []
    offset = 0
    for i, ask in enumerate(asks):
        start, end = plan.starts[i], plan.ends[i]
        if ask.positions is not None:
            unmoved, to = ask.positions.moved(start, end)
            rows += range(offset + unmoved, offset + end - start)
            positions += to
        offset += end - start
    return (rows, positions) if rows else None


def init_new(forward_batch: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `ForwardBatch.init_new`: the positions that the forward being launched was asked for."""
    _replace(forward_batch)


@guard.guarded
def _replace(forward_batch: Any) -> None:
    session = guard.active()
    moved = session.of(Positions)
    if session.plan is None or moved is None or moved.rows is None:
        return
    given = forward_batch.positions
    rows, to = (torch.tensor(x, device=given.device) for x in moved.rows)
    # A new tensor: writing into SGLang's could reach one that another batch shares.
    forward_batch.positions = given.index_copy(0, rows, to.to(given.dtype))
