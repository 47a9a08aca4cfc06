"""Which latents belong together: by the angle of what they write, and by when they fire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LINKED = 0.3
"""From which on two latents are linked into a cluster: their Jaccard index beyond that of independent latents of the
same rates, as a share of what it could be beyond it. Two independent latents that fire in 1 % of the rows have an
index of 0.005, and two that fire in 60 % one of 0.43."""
_BLOCK = 512


@dataclass(frozen=True)
class Near:
    """The k nearest of each latent, nearest first; `[M, k]`, -1 where there are fewer."""

    latent: Array
    value: Array


def by_decoder(W_dec_MD: Array, alive: Array, k: int = 5) -> Near:
    """By cosine of decoder rows, among latents that fire."""
    norm = np.linalg.norm(W_dec_MD, axis=1, keepdims=True)
    unit = (W_dec_MD / np.maximum(norm, 1e-12)).astype(np.float32)

    def of(part: slice) -> Array:
        return unit[part] @ unit.T

    return _nearest(len(unit), alive, k, of)


def by_firing(fires: Any, k: int = 5) -> Near:
    """By the Jaccard index of the rows in which two latents fire.

    Args:
        fires: scipy CSR `[N, M]` of 0 and 1.
    """
    together, counts = _together(fires)

    def of(part: slice) -> Array:
        both = together[part].toarray()
        return both / np.maximum(counts[part][:, None] + counts[None] - both, 1)

    return _nearest(len(counts), counts > 0, k, of, least=1e-9)


def clusters(fires: Any, *, linked: float = LINKED, least: int = 2) -> Array:
    """Number of the cluster of each latent, largest first, int64 `[M]`; -1: in none.

    Connected components of the graph of latents that are linked (see `LINKED`); latents that fire in fewer than `least`
    rows are in none.
    """
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    together, counts = _together(fires)
    pairs = together.tocoo()
    a, b = pairs.coords
    jaccard = pairs.data / (counts[a] + counts[b] - pairs.data)
    rate = counts / fires.shape[0]
    chance = rate[a] * rate[b] / (rate[a] + rate[b] - rate[a] * rate[b])
    keep = (
        (a != b)
        & (chance < 1)
        & (jaccard - chance >= linked * (1 - chance))
        & (counts[a] >= least)
        & (counts[b] >= least)
    )
    graph = sparse.coo_array((np.ones(int(keep.sum())), (a[keep], b[keep])), shape=together.shape)
    _, label = connected_components(graph, directed=False)
    sizes = np.bincount(label)
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return np.where(sizes[label] > 1, rank[label], -1)


def _together(fires: Any) -> tuple[Any, Array]:
    """Rows in which both of two latents fire, CSR `[M, M]`, and in which each does."""
    one = fires.astype(np.float32)
    together = (one.T @ one).tocsr()
    return together, np.asarray(one.sum(0)).ravel()


def _nearest(latents: int, alive: Array, k: int, of: Any, least: float = -np.inf) -> Near:
    found, values = np.full((latents, k), -1), np.full((latents, k), np.nan)
    for start in range(0, latents, _BLOCK):
        part = slice(start, min(start + _BLOCK, latents))
        value = np.array(of(part), dtype=np.float64)
        value[:, ~alive] = -np.inf
        value[np.arange(len(value)), np.arange(part.start, part.stop)] = -np.inf
        take = min(k, latents)
        at = np.argsort(-value, axis=1, kind="stable")[:, :take]
        best = np.take_along_axis(value, at, 1)
        good = np.isfinite(best) & (best > least) & alive[part][:, None]
        found[part, :take] = np.where(good, at, -1)
        values[part, :take] = np.where(good, best, np.nan)
    return Near(found, values)
