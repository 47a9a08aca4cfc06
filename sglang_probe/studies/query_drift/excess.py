"""Excess drift: does decoding differ from the prompt by more than the same distance within the prompt does?

A falling cosine says "far apart", not "decode". X(Δ) is the mean pre-RoPE cosine of prompt queries Δ apart minus that
of window and decode queries Δ apart (`prompt_HX - decode_HX`); 0 means that decode queries are as far from the window
as prompt queries would be.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sglang_probe.studies.query_drift.cosine import unit


@dataclass(frozen=True)
class ExcessDrift:
    """Per head and bin of distances; a bin without pairs is NaN and its count 0."""

    edges: Tensor
    """Bin x holds the distances `edges[x] <= Δ < edges[x + 1]`."""
    prompt_HX: Tensor
    """Mean cosine of prompt pairs, weighted to the distances of the decode pairs in the bin."""
    decode_HX: Tensor
    prompt_pairs_X: Tensor
    decode_pairs_X: Tensor
    """Pairs at distances that both sides have; others are not compared."""


def excess_drift(
    prompt_NHD: Tensor, prompt_at: Tensor, decode_THD: Tensor, decode_at: Tensor, *, window: int, edges: Tensor
) -> ExcessDrift:
    """Mean cosines by distance, of prompt pairs and of window-decode pairs.

    Args:
        prompt_NHD: pre-RoPE queries of prompt positions that were computed, raw or centred; the last `window` positions
        of
            the prompt must be among them.
        prompt_at: their positions `[N]`, ascending. A reused position has no query and is simply missing here.
        decode_THD: pre-RoPE decode queries, raw or centred alike.
        decode_at: their positions `[T]`.
        window: length of the observation window, which ends at the last prompt position.
        edges: ascending bin edges of distances `[X + 1]`, the first at least 1.
    """
    p, d = unit(prompt_NHD).movedim(-3, -2), unit(decode_THD).movedim(-3, -2)
    inside = prompt_at > prompt_at[-1] - window
    apart_prompt = prompt_at[None, :] - prompt_at[:, None]
    apart_decode = decode_at[None, :] - prompt_at[inside][:, None]
    prompt_sum, prompt_pairs = _by_distance(p @ p.mT, apart_prompt, int(edges[-1]))
    decode_sum, decode_pairs = _by_distance(p[..., inside, :] @ d.mT, apart_decode, int(edges[-1]))
    # Few window-decode pairs are close and many prompt pairs are. Without equal weights per distance the bins would
    # compare different distances, and a slow walk would seem to drift in excess.
    both = (prompt_pairs > 0) & (decode_pairs > 0)
    weight = (decode_pairs * both).to(prompt_sum.dtype) / prompt_pairs.clamp(min=1)
    spans = list(pairwise(edges.tolist()))

    def binned(x: Tensor) -> Tensor:
        return torch.stack([x[..., low:high].sum(-1) for low, high in spans], -1)

    pairs = binned(decode_pairs * both)
    return ExcessDrift(
        edges,
        prompt_HX=binned(prompt_sum * weight) / torch.where(pairs > 0, pairs, torch.nan),
        decode_HX=binned(decode_sum * both) / torch.where(pairs > 0, pairs, torch.nan),
        prompt_pairs_X=binned(prompt_pairs * both),
        decode_pairs_X=pairs,
    )


def _by_distance(cosine_HIJ: Tensor, apart_IJ: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Sums of cosines `[..., H, end]` and numbers of pairs `[end]` at each distance from 1 to `end - 1`."""
    valid = (apart_IJ >= 1) & (apart_IJ < end)
    sums = cosine_HIJ.new_zeros(*cosine_HIJ.shape[:-2], end)
    sums.index_add_(-1, apart_IJ[valid], cosine_HIJ[..., valid])
    return sums, torch.bincount(apart_IJ[valid], minlength=end)
