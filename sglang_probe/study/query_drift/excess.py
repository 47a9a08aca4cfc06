"""Excess drift: does decoding differ from the prompt by more than the same distance within the prompt does?

A falling cosine says "far apart", not "decode". X(Δ) is the mean pre-RoPE cosine of prompt queries Δ apart minus that
of window and decode queries Δ apart; 0 means that decode queries are as far from the window as prompt queries would be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_probe.study.query_drift.cosine import unit


@dataclass(frozen=True)
class ExcessDrift:
    """Per head and bin of distances; a bin without pairs is NaN and its count 0."""

    edges: Tensor
    """Bin x holds the distances `edges[x] <= Δ < edges[x + 1]`."""
    prompt_HX: Tensor
    decode_HX: Tensor
    prompt_pairs_X: Tensor
    decode_pairs_X: Tensor

    @property
    def excess_HX(self) -> Tensor:
        """X(Δ), positive where decode queries drifted further than distance explains."""
        return self.prompt_HX - self.decode_HX


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
    prompt_HX, prompt_pairs = _by_distance(p @ p.mT, apart_prompt, edges)
    decode_HX, decode_pairs = _by_distance(p[..., inside, :] @ d.mT, apart_decode, edges)
    return ExcessDrift(edges, prompt_HX, decode_HX, prompt_pairs, decode_pairs)


def _by_distance(cosine_HIJ: Tensor, apart_IJ: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the pairs of each bin, `[..., H, X]`, and numbers of pairs `[X]`."""
    bins = len(edges) - 1
    which = torch.bucketize(apart_IJ, edges, right=True) - 1
    valid = (which >= 0) & (which < bins)
    pairs = torch.bincount(which[valid], minlength=bins)
    sums = cosine_HIJ.new_zeros(*cosine_HIJ.shape[:-2], bins)
    sums.index_add_(-1, which[valid], cosine_HIJ[..., valid])
    return torch.where(pairs > 0, sums / pairs, torch.nan), pairs
