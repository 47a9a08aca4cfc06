"""The error that an eviction makes in the attention output of a layer, with full-cache inputs (local error).

For one query, `õ - o = p (v̄_kept - v̄_evicted)`, p the evicted mass: a small mass with a large gap between the values
hurts, a large mass with a small gap does not. Only a real compressed decode gives the propagated error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.layer import Layer


@dataclass(frozen=True)
class OutputError:
    """Errors per decode step; NaN where the reference output is zero."""

    relative_GRT: Tensor
    """‖õ - o‖ / ‖o‖ per query head, `[..., G, R, T]`."""
    evicted_GRT: Tensor
    """Evicted mass p."""
    gap_GRT: Tensor
    """‖v̄_kept - v̄_evicted‖ / ‖o‖, so that `relative = evicted · gap`; NaN where nothing is evicted."""
    projected_T: Tensor | None
    """‖W_O concat(õ - o)‖ / ‖W_O concat(o)‖ over all heads, `[..., T]`; None without `w_o_HDM`."""


def output_error(layer: Layer, keep_TGL: Tensor) -> OutputError:
    """Output error of a kept set over the scored decode steps; generated tokens are always kept.

    Raises:
        ProbeError: values were not captured, or a decode step is left with no mass at all.
    """
    a_GRTJ = layer.future_attention
    v_GJD = layer.future_values.to(a_GRTJ.dtype).movedim(-3, -2)
    keep_GTL = keep_TGL.movedim(-3, -2)
    generated = keep_GTL.new_ones(*keep_GTL.shape[:-1], a_GRTJ.shape[-1] - layer.length)
    keep = torch.cat([keep_GTL, generated], -1).unsqueeze(-3)
    kept = a_GRTJ * keep
    gone = a_GRTJ * ~keep
    mass, lost = kept.sum(-1), gone.sum(-1)
    if bool((mass <= 0).any()):
        raise ProbeError("a decode step keeps no attention mass", fix="keep at least one position per head")
    # Weighted sums of kept and evicted values; their sum is the full output, computed so that keeping all gives exactly
    # 0.
    kept_sum, gone_sum = _matmul(kept, v_GJD), _matmul(gone, v_GJD)
    full = kept_sum + gone_sum
    difference = lost[..., None] * kept_sum / mass[..., None] - gone_sum
    norm = full.norm(dim=-1)
    gap = (kept_sum / mass[..., None] - gone_sum / lost[..., None]).norm(dim=-1) / norm
    projected = None
    if layer.w_o_HDM is not None:
        projected = _projected(difference, layer.w_o_HDM) / _projected(full, layer.w_o_HDM)
    return OutputError(difference.norm(dim=-1) / norm, lost, gap, projected)


def _matmul(a_GRTJ: Tensor, v_GJD: Tensor) -> Tensor:
    return torch.unflatten(a_GRTJ.flatten(-3, -2) @ v_GJD, -2, a_GRTJ.shape[-3:-1])


def _projected(o_GRTD: Tensor, w_o_HDM: Tensor) -> Tensor:
    o_THD = o_GRTD.flatten(-4, -3).movedim(-2, -3)
    return (o_THD.flatten(-2) @ w_o_HDM.to(o_THD.dtype).flatten(-3, -2)).norm(dim=-1)
