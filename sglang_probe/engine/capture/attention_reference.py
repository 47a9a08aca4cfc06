"""`attention_kernel.attention_summary` in PyTorch operations, for a CPU and as what the kernel is compared with.

It gathers the keys of each request and holds the logits of all of them. No tensor is read by the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_probe.engine.capture.attention_summary import AttentionSummary


def attention_summary(
    q_BHD: Tensor,
    key_pool_SGD: Tensor,
    slots_BL: Tensor,
    lengths_B: Tensor,
    region_ends_BR: Tensor,
    heads_N: Tensor,
    *,
    scaling: float,
    top_k: int,
    softcap: float = 0.0,
    sliding_window: int = 0,
    first_B: Tensor | None = None,
    longest: int = 0,
) -> AttentionSummary:
    """Summarise the attention of each request's newest token; arguments as of the kernel."""
    kv_heads = key_pool_SGD.shape[1]
    j = torch.arange(slots_BL.shape[1], device=q_BHD.device)
    seen_BJ = j < lengths_B[:, None]
    if sliding_window:
        seen_BJ = seen_BJ & (j >= lengths_B[:, None] - sliding_window)
    k_BJGD = key_pool_SGD[slots_BL.long() * seen_BJ].float()  # what is past a request is no slot of its
    q_BND = q_BHD.index_select(1, heads_N).float()
    groups_N = heads_N // (q_BHD.shape[1] // kv_heads)
    logits_BNJ = torch.einsum("bnd,bjnd->bnj", q_BND, k_BJGD.index_select(2, groups_N)) * scaling
    if softcap:
        logits_BNJ = softcap * torch.tanh(logits_BNJ / softcap)
    logits_BNJ = logits_BNJ.masked_fill(~seen_BJ[:, None], 0.0)
    hidden_BNJ = logits_BNJ.masked_fill(~seen_BJ[:, None], -torch.inf)

    lse, mean = [], []
    starts_BR = torch.nn.functional.pad(region_ends_BR[:, :-1], (1, 0))
    for r in range(region_ends_BR.shape[1]):
        inside_BJ = (j >= starts_BR[:, r, None]) & (j < region_ends_BR[:, r, None])
        here_BNJ = hidden_BNJ.masked_fill(~inside_BJ[:, None], -torch.inf)
        lse.append(torch.logsumexp(here_BNJ, -1))
        weights_BNJ = torch.softmax(here_BNJ, -1).nan_to_num(0.0)  # an empty region has none
        mean.append((weights_BNJ * logits_BNJ).sum(-1))
    lse_BNR = torch.stack(lse, -1)

    weights_BNJ = torch.exp(hidden_BNJ - torch.logsumexp(lse_BNR, -1, keepdim=True))
    best = torch.nn.functional.pad(hidden_BNJ, (0, top_k), value=-torch.inf).sort(dim=-1, descending=True, stable=True)
    none = torch.isneginf(best.values[..., :top_k])
    positions = best.indices[..., :top_k].to(torch.int32).masked_fill(none, -1)
    padded_BNJ = torch.nn.functional.pad(weights_BNJ, (0, top_k))
    first = None
    if first_B is not None:
        room = torch.nn.functional.pad(hidden_BNJ, (0, max(0, longest - len(j))), value=-torch.inf)[..., :longest]
        past = torch.arange(longest, device=j.device) >= first_B[:, None]
        first = room.masked_fill(past[:, None], -torch.inf)
    return AttentionSummary(
        lse_BNR,
        torch.stack(mean, -1),
        positions,
        padded_BNJ.gather(-1, best.indices[..., :top_k]),
        first,
    )
