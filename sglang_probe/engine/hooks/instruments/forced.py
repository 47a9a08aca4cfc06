"""Forced decoding: prescribed tokens take the place of sampled ones, through the real decode path.

The replacement happens on the sampler's output, before SGLang relays it to the next step (`Scheduler.run_batch`,
`_relay_forward_payload`), so that overlap scheduling, the KV cache and stopping see the prescribed token.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_probe.engine.hooks import session as probe


def sample(next_token_ids: torch.Tensor, _runner: Any, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    """AFTER `ModelRunner.sample`."""
    _replace(next_token_ids)
    return next_token_ids


@probe.guarded
def _replace(next_token_ids: torch.Tensor) -> None:
    forced = probe.active().forced
    if forced is None:
        return
    rows, tokens = (torch.tensor(x).to(next_token_ids.device, non_blocking=True) for x in forced)
    next_token_ids[rows] = tokens.to(next_token_ids.dtype)
