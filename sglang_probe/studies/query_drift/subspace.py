"""Subspace drift: how much of the decode queries lies in the directions that the window spans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_probe.errors import ProbeError


@dataclass(frozen=True)
class SubspaceDrift:
    """Per head, `[..., H]`, from centred pre-RoPE queries."""

    rank: Tensor
    """k: directions that hold the asked share of the window's energy, at most half the window."""
    captured: Tensor
    """Energy of the decode queries within the window's k directions, over all their energy. Asymmetric."""
    captured_null: Tensor
    """k / D: what k random directions capture of isotropic queries."""
    angle_cosines: Tensor
    """Cosines of the principal angles between the top k directions of both sides, `[..., H, K]`; 0 beyond k."""
    chordal: Tensor
    """sqrt(Σ sin²) over the k principal angles."""


def subspace_drift(window_NHD: Tensor, decode_THD: Tensor, *, energy: float = 0.9) -> SubspaceDrift:
    """Compare the top directions of the window with the decode queries. Both must be centred by the same mean.

    Centring by the window's own mean costs one direction of the window and none of the decode queries.

    Raises:
        ProbeError: fewer than two queries on one side.
    """
    if min(window_NHD.shape[-3], decode_THD.shape[-3]) < 2:
        raise ProbeError("a subspace needs at least two queries on each side")
    w, d = _by_head(window_NHD), _by_head(decode_THD)
    u_w, rank = _directions(w, energy, cap=window_NHD.shape[-3] // 2)
    u_d = torch.linalg.svd(d, full_matrices=False).Vh
    inside = torch.arange(u_w.shape[-2], device=w.device) < rank[..., None]
    captured = (d @ u_w.mT).square().sum(-2)
    share = (captured * inside).sum(-1) / d.square().sum((-1, -2))
    # The decode side gets as many directions, or all it has.
    keep_d = torch.arange(u_d.shape[-2], device=w.device) < rank[..., None]
    cosines = torch.linalg.svdvals((u_w * inside[..., None]) @ (u_d * keep_d[..., None]).mT).clamp(max=1)
    cosines = cosines[..., : int(rank.max())]
    counted = torch.arange(cosines.shape[-1], device=w.device) < rank[..., None]
    chordal = ((1 - cosines**2) * counted).sum(-1).sqrt()
    return SubspaceDrift(rank, share, rank / window_NHD.shape[-1], cosines, chordal)


def split_half_energy(window_NHD: Tensor, *, energy: float = 0.9) -> Tensor:
    """Null for `captured`: even rows of the window give the directions, odd rows are captured, `[..., H]`.

    The other null, an earlier prompt window of equal size, is `subspace_drift(window, earlier)`.
    """
    return subspace_drift(window_NHD[..., ::2, :, :], window_NHD[..., 1::2, :, :], energy=energy).captured


def phase_ratio(q_THD: Tensor, phase_T: Tensor, *, energy: float = 0.9) -> Tensor:
    """Energy that phases leave uncaptured of each other, over what halves of one phase leave of each other, `[..., H]`.

    1 means that phases (think, act, tool, ...) do not differ in their directions; more means that they do. Each phase
    is halved; directions come from one half and are applied to the other half of the same and of every other phase, so
    that both sides are estimated from equally many queries.

    Raises:
        ProbeError: fewer than two phases, or a phase with fewer than four queries.
    """
    parts = [q_THD[..., phase_T == p, :, :] for p in sorted(set(phase_T.tolist()))]
    if len(parts) < 2 or min(p.shape[-3] for p in parts) < 4:
        raise ProbeError("a phase ratio needs two phases with at least four queries each")
    halves = [(p[..., ::2, :, :], p[..., 1::2, :, :]) for p in parts]
    lost = {
        (i, j): 1 - subspace_drift(basis, other, energy=energy).captured
        for i, (basis, _) in enumerate(halves)
        for j, (_, other) in enumerate(halves)
    }
    within = torch.stack([x for (i, j), x in lost.items() if i == j]).mean(0)
    between = torch.stack([x for (i, j), x in lost.items() if i != j]).mean(0)
    return between / within


def _directions(x_HND: Tensor, energy: float, *, cap: int) -> tuple[Tensor, Tensor]:
    """Right singular vectors `[..., H, K, D]` and how many hold the share of energy, at least 1 and at most `cap`."""
    svd = torch.linalg.svd(x_HND, full_matrices=False)
    share = svd.S.square().cumsum(-1) / svd.S.square().sum(-1, keepdim=True)
    rank = ((share < energy).sum(-1) + 1).clamp(max=max(1, min(cap, svd.S.shape[-1])))
    return svd.Vh, rank


def _by_head(x_NHD: Tensor) -> Tensor:
    return x_NHD.to(torch.float64).movedim(-3, -2)
