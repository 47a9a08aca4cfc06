"""`splice`: an SAE's reconstruction in place of rows of the residual stream, and the control for it.

    splice                x + a (x^ - x)          a: a fraction; x^ = decode(encode(x))
    with `random_error`   x + a |x^ - x| u        u: a random direction, uniform on the sphere

An SAE's errors may do more, or less, than errors of their length: the control says what any error of that length does
(Gurnee 2024 found those of SAEs to be worse). Its direction follows from the seed that the request gives and the
position of the row, so that chunks, prefix hits, retractions and a recomputation elsewhere draw the same.

Sums are fp32. Only the rows that the plan names are encoded. Products of many rows at once may round a row otherwise
than alone, as the model's own do; other rows of the forward are not touched.

Shapes: N rows, D width of the model, M latents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sglang_probe.hashing import GOLDEN, mix64

if TYPE_CHECKING:
    from sglang_probe.sae.sae import SAE
    from sglang_probe.steering.apply import Bank
    from sglang_probe.steering.plan import Rows

Array = np.ndarray[Any, Any]

_BLOCK = 1 << 23
"""Activations held at once: 32 MiB in float32, whatever the number of rows and latents."""


def on_device(sae: SAE, device: torch.device | str) -> SAE:
    """The SAE with its weights on a device."""
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    held: dict[str, Any] = {n: None if (t := getattr(sae, n)) is None else t.to(device) for n in names}
    return replace(sae, **held)


def reconstructed(x_ND: Tensor, sae: SAE) -> Tensor:
    """Rows as an SAE has them, fp32 `[N, D]`, in blocks of bounded memory."""
    rows = max(_BLOCK // sae.latents, 1)
    parts = [sae.reconstruct(part) for part in x_ND.float().split(rows)]  # type: ignore[no-untyped-call]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def splice_changes(x_ND: Tensor, rows: Rows, bank: Bank) -> Tensor:
    """What splicing adds to rows, fp32 `[N, D]`.

    Args:
        rows: of one pass, all of `splice`; row i is that of `x_ND[i]`.
    """
    x = x_ND.float()
    change = torch.empty_like(x)
    for number in np.unique(rows.vector):
        at = torch.from_numpy(np.flatnonzero(rows.vector == number)).to(x.device)
        change[at] = reconstructed(x[at], bank.saes[int(number)]) - x[at]
    random = np.flatnonzero(rows.random >= 0)
    block = max(_BLOCK // (16 * x.shape[1]), 1)  # a direction takes some eleven times its size while it is drawn
    for start in range(0, len(random), block):
        some = random[start : start + block]
        at = torch.from_numpy(some).to(x.device)
        u = torch.from_numpy(directions(rows.random[some], rows.position[some], x.shape[1])).to(x.device)
        change[at] = change[at].norm(dim=1, keepdim=True) * u
    return change * torch.from_numpy(rows.amount).to(x.device)[:, None]


def directions(seed_N: Array, position_N: Array, width: int) -> Array:
    """Unit vectors, float32 `[N, width]`, each from its seed and position alone: uniform on the sphere.

    A counter's hash (`mix64`) in place of a generator with a state, and normal numbers by Box and Muller (1958).
    """
    key = mix64((np.asarray(seed_N).astype(np.uint64) + np.uint64(1)) * GOLDEN)
    key = mix64(key + (np.asarray(position_N).astype(np.uint64) + np.uint64(1)) * GOLDEN)
    pairs = (width + 1) // 2
    bits = mix64(key[:, None] + (np.arange(2 * pairs, dtype=np.uint64) + np.uint64(1)) * GOLDEN)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:, :pairs])), 2 * np.pi * uniform[:, pairs:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :width]
    return (normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32)


def undecided(x_ND: Tensor, sae: SAE, tolerance: float) -> Tensor:
    """Rows, bool `[N]`, for which rounding may decide whether a latent is active, and by that what the row becomes.

    Args:
        tolerance: relative error of a row that is still correct; four deviations of it along an encoder column count.
    """
    x = x_ND.float()
    pre = sae.pre_activations(x)
    reach = 4 * tolerance * x.norm(dim=1)[:, None] * sae.W_enc.norm(dim=0) / x.shape[1] ** 0.5
    if sae.architecture == "topk":
        assert sae.k is not None
        scale = sae.decoder_norms if sae.rescale_by_decoder_norm else 1.0
        pre, reach = pre * scale, reach * scale
        if sae.k == sae.latents:
            return torch.zeros(len(x), dtype=torch.bool)
        edge = torch.topk(pre, sae.k + 1, dim=-1)
        width = reach.gather(1, edge.indices[:, -2:]).sum(1)
        return (edge.values[:, -2] - edge.values[:, -1] <= width) & (edge.values[:, -2] > -width)
    if sae.threshold is None:  # begins at 0 without a jump
        return torch.zeros(len(x), dtype=torch.bool)
    near: Tensor = (pre - sae.threshold).abs() <= reach
    return (near & (sae.threshold > 0)).any(dim=1)
