"""`AttentionSummary` on a GPU: one Triton kernel over sampled heads, reading queries and the paged key pool in place.

One program per request and head walks the request's keys in blocks, as decode attention does, with the running maximum
of Milakov and Gimelshein (arXiv 1805.02867). It reads every key of a sampled head once and writes a few numbers. Long
contexts are not split over several programs: with few requests and one head the walk is sequential.

It has been run in Triton's interpreter and compiled for GPUs (test_attention_kernel.py), not run on one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_probe.engine.capture.attention_summary import AttentionSummary
from sglang_probe.errors import ProbeError

_BLOCK = 64


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
    """Summarise the attention of each request's newest token. Enqueues work only; no tensor is read by the host.

    Args:
        q_BHD: rotated queries of one decode step and layer, `[B, H, D]`.
        key_pool_SGD: SGLang's `token_to_kv_pool.get_key_buffer(layer)`, `[slots, G, D]`, rotated; the keys of this step
            are stored. Not an fp8 pool.
        slots_BL: slot of each position, int32 or int64 `[B, Lmax]`: rows of `req_to_token`.
        lengths_B: keys that each request sees, its newest included, int32 or int64 `[B]`; at least 1.
        region_ends_BR: end (exclusive) of each region, ascending, int32 or int64 `[B, R]`. Region r is
            `[ends[r - 1], ends[r])`, the first begins at 0, and the last ends at the length.
        heads_N: query heads to summarise, int32 or int64 `[N]`; head h reads kv head `h // (H // G)`.
        scaling, softcap, sliding_window: how the layer makes logits (`study.attention.AttentionSpec`); 0 is none.
        top_k: positions to list, at least 1.
        first_B: keys of each request whose logits are to be returned as well, int32 or int64 `[B]`; `longest` is no
            less than any of them.

    Returns:
        B requests, N heads.

    Raises:
        ProbeError: shapes do not fit.
    """
    b, heads, dim = q_BHD.shape
    kv_heads = key_pool_SGD.shape[1]
    regions, n = region_ends_BR.shape[1], heads_N.shape[0]
    if heads % kv_heads or key_pool_SGD.shape[2] != dim or top_k < 1:
        raise ProbeError(
            f"queries of {heads} heads of {dim} do not fit keys of {kv_heads} heads of {key_pool_SGD.shape[2]}, "
            f"or top_k is {top_k}"
        )
    if len({b, *(len(x) for x in (slots_BL, lengths_B, region_ends_BR))}) != 1 or q_BHD.stride(2) != 1:
        raise ProbeError("queries, slots, lengths and regions must be of the same requests, each head contiguous")
    listed = triton.next_power_of_2(top_k)
    lse, mean, logits = (q_BHD.new_empty((b, n, size), dtype=torch.float32) for size in (regions, regions, listed))
    positions = torch.empty_like(logits, dtype=torch.int32)
    first_logits = q_BHD.new_full((b, n, longest), -torch.inf, dtype=torch.float32)
    _summarise[(b, n)](
        q_BHD,
        key_pool_SGD,
        slots_BL,
        lengths_B,
        region_ends_BR.contiguous(),
        heads_N,
        lse,
        mean,
        positions,
        logits,
        lengths_B if first_B is None else first_B,
        first_logits,
        longest,
        scaling,
        softcap,
        sliding_window,
        heads // kv_heads,
        q_BHD.stride(0),
        q_BHD.stride(1),
        key_pool_SGD.stride(0),
        key_pool_SGD.stride(1),
        slots_BL.stride(0),
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        REGIONS=regions,
        BLOCK_R=triton.next_power_of_2(regions),
        TOP=listed,
        BLOCK=_BLOCK,
        SOFTCAP=softcap > 0,
        FIRST=first_B is not None,
    )
    # The kernel keeps the best in no order: by position first, so that equal ones stay in theirs.
    by_position = positions.argsort(-1)
    positions, logits = positions.gather(-1, by_position), logits.gather(-1, by_position)
    best = logits.sort(dim=-1, descending=True, stable=True)
    positions = positions.gather(-1, best.indices)[..., :top_k]
    total = torch.logsumexp(lse, -1, keepdim=True)
    weights = torch.exp(best.values[..., :top_k] - total)
    none = positions < 0
    return AttentionSummary(
        lse,
        mean,
        positions.masked_fill(none, -1),
        weights.masked_fill(none, 0.0),
        None if first_B is None else first_logits,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _summarise(  # type: ignore[no-untyped-def]
    q,
    keys,
    slots,
    lengths,
    region_ends,
    heads,
    out_lse,
    out_mean,
    out_positions,
    out_logits,
    first_keys,
    out_first,
    longest,
    scaling,
    softcap,
    window,
    group,
    q_stride_b,
    q_stride_h,
    key_stride_s,
    key_stride_g,
    slot_stride_b,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REGIONS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FIRST: tl.constexpr,
):
    request, sample = tl.program_id(0), tl.program_id(1)
    out = request * tl.num_programs(1) + sample
    head = tl.load(heads + sample)
    length = tl.load(lengths + request).to(tl.int32)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)

    d = tl.arange(0, BLOCK_D)
    in_head = d < DIM
    query = tl.load(q + request * q_stride_b + head * q_stride_h + d, mask=in_head, other=0.0).to(tl.float32)

    r = tl.arange(0, BLOCK_R)
    end = tl.load(region_ends + request * REGIONS + r, mask=r < REGIONS, other=2147483647)
    start = tl.load(region_ends + request * REGIONS + r - 1, mask=(r > 0) & (r < REGIONS), other=0)
    start = tl.where(r < REGIONS, start, 2147483647)

    top = tl.arange(0, TOP)
    top_logit = tl.full((TOP,), float("-inf"), tl.float32)
    top_position = -1 - top  # all different, so that exactly one is replaced

    # Per region: running maximum, sum of exp, sum of exp times logit.
    high = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    weighted = tl.zeros((BLOCK_R,), tl.float32)

    for begin in range((first // BLOCK) * BLOCK, length, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        seen = (j < length) & (j >= first)
        slot = tl.load(slots + request * slot_stride_b + j, mask=seen, other=0).to(tl.int64)
        at = slot[:, None] * key_stride_s + (head // group) * key_stride_g + d[None, :]
        key = tl.load(keys + at, mask=seen[:, None] & in_head[None, :], other=0.0).to(tl.float32)
        finite = tl.sum(key * query[None, :], 1) * scaling
        if SOFTCAP:
            finite = softcap * (2.0 * tl.sigmoid(2.0 * finite / softcap) - 1.0)  # tanh
        logit = tl.where(seen, finite, float("-inf"))
        if FIRST:
            at_first = out_first + out.to(tl.int64) * longest + j
            tl.store(at_first, finite, mask=seen & (j < tl.load(first_keys + request)))

        inside = (j[:, None] >= start[None, :]) & (j[:, None] < end[None, :]) & seen[:, None]
        here = tl.where(inside, logit[:, None], float("-inf"))
        new_high = tl.maximum(high, tl.max(here, 0))
        shift = tl.where(new_high == float("-inf"), 0.0, new_high)  # nothing seen yet
        weight = tl.exp(here - shift[None, :])
        keep = tl.exp(high - shift)
        total = total * keep + tl.sum(weight, 0)
        weighted = weighted * keep + tl.sum(weight * finite[:, None], 0)
        high = new_high

        for _ in range(TOP):
            best = tl.max(logit, 0)
            worst = tl.min(top_logit, 0)
            where = begin + tl.argmax(logit, 0)
            victim = tl.max(tl.where(top_logit == worst, top_position, -2147483648), 0)
            replaced = (top_logit == worst) & (top_position == victim)
            top_logit = tl.where(replaced, tl.maximum(best, worst), top_logit)
            top_position = tl.where(replaced, tl.where(best > worst, where, victim), top_position)
            logit = tl.where(j == where, float("-inf"), logit)

    valid = r < REGIONS
    some = total > 0
    safe = tl.where(some, total, 1.0)
    tl.store(out_lse + out * REGIONS + r, tl.where(some, high + tl.log(safe), float("-inf")), mask=valid)
    tl.store(out_mean + out * REGIONS + r, tl.where(some, weighted / safe, 0.0), mask=valid)
    tl.store(out_positions + out * TOP + top, top_position)
    tl.store(out_logits + out * TOP + top, top_logit)
