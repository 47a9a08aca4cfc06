"""RoPE positions apart from sequence positions (`sglang_probe.ask`).

Positions of a forward pass are built from the host's lists in `ForwardBatch.init_new` and read by nothing but the
rotation, so that replacing them there leaves KV slots, masks and the ledger alone. Keys of such a request are not those
of its tokens at their places: it must neither reuse moved positions from the tree nor publish them
(`engine/hooks/policy.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_probe.ask import Ask, PositionOverride
from sglang_probe.engine.hooks import session as probe
from sglang_probe.engine.ledger.recorder import ForwardPlan
from sglang_probe.errors import ConfigError


def init_new(forward_batch: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `ForwardBatch.init_new`: the positions that the forward being launched was asked for."""
    _replace(forward_batch)


def create_generation_req(req: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """A request was made: refuse what cannot be read or leaves the rotary tables. For the release's own hook."""
    try:
        override = Ask.of(req.sampling_params).positions
    except ConfigError as e:
        req.set_finish_with_abort(e.message)
        return
    if override is None:
        return
    length = len(req.origin_input_ids) + (req.sampling_params.max_new_tokens or 0)
    limit = scheduler.model_config.context_len
    if override.start >= len(req.origin_input_ids) or override.last(length) >= limit:
        req.set_finish_with_abort(
            f"custom_params.probe.positions: from {override.start} to {override.to} is not within a prompt of "
            f"{len(req.origin_input_ids)} tokens and a context of {limit}"
        )


def moved_positions(reqs: list[Any], plan: ForwardPlan) -> tuple[list[int], list[int]] | None:
    """Rows of this forward whose RoPE position is prescribed, and the positions."""
    rows: list[int] = []
    positions: list[int] = []
    offset = 0
    for i, req in enumerate(reqs):
        start, end = plan.starts[i], plan.ends[i]
        if (override := _readable(req)) is not None:
            unmoved, to = override.moved(start, end)
            rows += range(offset + unmoved, offset + end - start)
            positions += to
        offset += end - start
    return (rows, positions) if rows else None


def _readable(req: Any) -> PositionOverride | None:
    """What a request asks for; None also where it was refused for what cannot be read."""
    try:
        return Ask.of(req.sampling_params).positions
    except ConfigError:
        return None


@probe.guarded
def _replace(forward_batch: Any) -> None:
    session = probe.active()
    if session.current is None or session.positions is None:
        return
    given = forward_batch.positions
    rows, to = (torch.tensor(x, device=given.device) for x in session.positions)
    # A new tensor: writing into SGLang's could reach one that another batch shares.
    forward_batch.positions = given.index_copy(0, rows, to.to(given.dtype))
