"""Negative controls: the same method fed with what it should not be able to use. Its gain must vanish.

Only the selection is made on the spoiled layer; it is judged on the true one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from sglang_probe.eviction.layer import Layer


def shuffled_keys(layer: Layer, seed: int = 0) -> Layer:
    """Prompt keys in another order, drawn once and shared by all requests, layers and heads."""
    order = torch.randperm(layer.length, generator=torch.Generator().manual_seed(seed))
    return replace(layer, k_LGD=layer.k_LGD[..., order, :, :])


def other_requests_queries(layer: Layer, seed: int = 0) -> Layer:
    """Prompt and lookahead queries of the next request of the batch (leading axis); a lone request keeps its own."""
    ahead = {name: replace(q, q_THD=q.q_THD.roll(1, 0)) for name, q in layer.lookahead.items()}
    return replace(layer, q_NHD=layer.q_NHD.roll(1, 0), lookahead=ahead)


def wrong_window(layer: Layer, seed: int = 0) -> Layer:
    """Prompt queries from the middle of the prompt, presented as its last ones."""
    captured = layer.q_NHD.shape[-3]
    return replace(layer, q_NHD=layer.q_NHD[..., : max(1, captured // 2), :, :])


WRONG_WINDOW = "window at the wrong position"
Spoil = Callable[[Layer, int], Layer]

CONTROLS: dict[str, Spoil] = {
    "shuffled keys": shuffled_keys,
    "queries of another request": other_requests_queries,
    WRONG_WINDOW: wrong_window,
}
