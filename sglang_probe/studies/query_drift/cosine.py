"""Cosine of decode queries to the observation window, and what rotation alone would do to it.

A post-RoPE cosine at equal positions is the pre-RoPE cosine, because both are turned alike: there are two numbers, not
three. Uncentred cosines of unrelated contents are already near 0.7 in published tables, because queries share a mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sglang_probe.attention.rope import Rotary


@dataclass(frozen=True)
class CosineDrift:
    """Cosines of each decode query to the window, `[..., T, H]`."""

    post: Tensor
    pre: Tensor
    pre_centred: Tensor
    """After subtracting the prompt's mean query from both sides."""
    post_nearest: Tensor
    """To the nearest single window query: a window with several modes makes its mean misleading."""
    pre_nearest: Tensor
    pre_centred_nearest: Tensor


def cosine_drift(
    decode_pre_THD: Tensor,
    window_pre_NHD: Tensor,
    mean_HD: Tensor,
    rotary: Rotary,
    *,
    decode_at: Tensor,
    window_at: Tensor,
) -> CosineDrift:
    """All cosines from pre-RoPE queries; post-RoPE ones are rotated to the positions given.

    Args:
        decode_pre_THD: decode queries before RoPE.
        window_pre_NHD: queries of the last prompt positions before RoPE.
        mean_HD: `prompt_mean` of this request's prompt, or of other requests; never of the decode queries.
        rotary: the model's.
        decode_at: positions `[T]`.
        window_at: positions `[N]`.
    """
    post_T, post_N = rotary.rotate(decode_pre_THD, decode_at), rotary.rotate(window_pre_NHD, window_at)
    centred_T, centred_N = centre(decode_pre_THD, mean_HD), centre(window_pre_NHD, mean_HD)
    return CosineDrift(
        post=window_cosine(post_T, post_N),
        pre=window_cosine(decode_pre_THD, window_pre_NHD),
        pre_centred=window_cosine(centred_T, centred_N),
        post_nearest=nearest_cosine(post_T, post_N),
        pre_nearest=nearest_cosine(decode_pre_THD, window_pre_NHD),
        pre_centred_nearest=nearest_cosine(centred_T, centred_N),
    )


def window_cosine(q_THD: Tensor, window_NHD: Tensor) -> Tensor:
    """Cosine of each query to the mean of the normalised window queries, `[..., T, H]`."""
    mean = unit(window_NHD).mean(-3, keepdim=True)
    return (unit(q_THD) * unit(mean)).sum(-1)


def nearest_cosine(q_THD: Tensor, window_NHD: Tensor) -> Tensor:
    """Cosine of each query to its nearest window query, `[..., T, H]`."""
    q, w = unit(q_THD).movedim(-3, -2), unit(window_NHD).movedim(-3, -2)
    return (q @ w.mT).amax(-1).mT


def prompt_mean(q_pre_LHD: Tensor, *, sinks: int = 4) -> Tensor:
    """Mean pre-RoPE query after the sinks, `[..., H, D]`. The first row of `q_pre_LHD` is position 0."""
    return q_pre_LHD[..., sinks:, :, :].to(torch.promote_types(q_pre_LHD.dtype, torch.float32)).mean(-3)


def centre(q_NHD: Tensor, mean_HD: Tensor) -> Tensor:
    """Queries minus a mean query."""
    return q_NHD.to(mean_HD.dtype) - mean_HD.unsqueeze(-3)


def rotation_null(rotary: Rotary, distances: Tensor, q_pre_NHD: Tensor | None = None) -> Tensor:
    """Cosine of a query to itself rotated by each distance: what a post-RoPE cosine loses with no change of content.

    Args:
        rotary: the model's.
        distances: position differences `[X]`.
        q_pre_NHD: queries whose energy per rotated pair is used, summed over N; None: equal energy everywhere.

    Returns:
        `[..., H, X]`, or `[X]` for equal energy.
    """
    angles = distances.to(torch.float64)[:, None] * rotary.frequencies().to(torch.float64)
    cos = functional.pad(angles.cos(), (0, 1), value=1.0)
    if q_pre_NHD is None:
        fixed = (rotary.head_dim - rotary.dim) / 2
        energy = torch.ones(rotary.dim // 2 + 1, dtype=torch.float64)
        energy[-1] = fixed
    else:
        q = q_pre_NHD.to(torch.float64)
        first, second = rotary.pairs(q)
        pairs = (first**2 + second**2).sum(-3)
        rest = (q[..., rotary.dim :] ** 2).sum(-1).sum(-2)
        energy = torch.cat([pairs, rest[..., None]], -1)
    return energy @ cos.mT / energy.sum(-1, keepdim=True)


def window_rotation_null(q_pre_THD: Tensor, rotary: Rotary, *, decode_at: Tensor, window_at: Tensor) -> Tensor:
    """What `window_cosine` of rotated queries would be if the window held each decode query itself, `[..., T, H]`.

    `rotation_null` for a window of many positions, with the energies of each query: the cosine of a query at its own
    position to the mean of copies of it at the window's positions.
    """
    copies = q_pre_THD.unsqueeze(-4).expand(*q_pre_THD.shape[:-3], len(window_at), *q_pre_THD.shape[-3:])
    cos, sin = rotary.tables(window_at)
    mean = rotary.turn(copies, cos[:, None, None], sin[:, None, None]).mean(-4)
    return (unit(rotary.rotate(q_pre_THD, decode_at)) * unit(mean)).sum(-1)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in at least float32."""
    return functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
