"""The model under kept sets, by `transformers` and a mask written out entry by entry: nothing of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sglang_probe.kept_set import Kept

_NAME = "sglang_probe_masked"
_masks: dict[int, Tensor] = {}


def hidden_states(model: Any, ids: list[int], kept: Kept | None) -> dict[int, Tensor]:
    """Output of every layer, `[positions, width]`, where each query sees what the rule of kept sets lets it see."""
    layers = len(model.model.layers)
    kv_heads = model.config.num_key_value_heads
    _masks.clear()
    for layer in range(layers):
        _masks[layer] = torch.stack([_mask(len(ids), kept, layer, head) for head in range(kv_heads)])
    outputs: dict[int, Tensor] = {}
    handles = [
        block.register_forward_hook(lambda _m, _a, out, i=i: outputs.__setitem__(i, _first(out).squeeze(0)))
        for i, block in enumerate(model.model.layers)
    ]
    try:
        with torch.no_grad():
            model(torch.tensor([ids]))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def load(path: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model with attention that obeys the masks."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=_NAME).eval()


def _mask(length: int, kept: Kept | None, layer: int, head: int) -> Tensor:
    seen = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        seen[query, : query + 1] = True
        if kept is not None and query >= kept.length:
            step = min(query - kept.length, len(kept.keep_SYGN) - 1)
            seen[query, : kept.length] = kept.keep_SYGN[step, layer, head]
    return seen


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, _mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = _masks[module.layer_idx].repeat_interleave(group, 0)
    logits = (q @ k.transpose(-1, -2) * scaling).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).contiguous(), None


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
