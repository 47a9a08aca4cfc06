"""Latents of one dictionary that are several in another, and the converse.

A latent of the first dictionary is *split* in the second if at least two latents there point its way (cosine of decoder
rows above 0.5), together fire in 80 % of the rows in which it fires, and none of them does alone. A *merge* is the same
read from the second dictionary. Dictionaries of one regime that differ by their seed alone have many of both, so a
count means nothing without theirs (`against`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Array = np.ndarray[Any, Any]
SIMILAR, COVERS = 0.5, 0.8
LEAST_FIRINGS = 20


def splits(
    first_MD: Array,
    second_KD: Array,
    fires_NM: csr_matrix,
    fires_NK: csr_matrix,
    *,
    similar: float = SIMILAR,
    covers: float = COVERS,
) -> pd.DataFrame:
    """Which latents of the first dictionary are split in the second.

    Args:
        first_MD, second_KD: decoder rows.
        fires_NM, fires_NK: whether each latent fires, on the same rows; sparse or dense.

    Returns:
        Of each latent that fires in at least 20 rows: `latent`, `neighbours` (how many), `alone` (share of its rows
        in which the best of them fires), `together` (any of them), `split`.

    Raises:
        ConfigError: the shapes do not fit.
    """
    from scipy.sparse import csc_matrix

    a, b = (csc_matrix(x).astype(bool) for x in (fires_NM, fires_NK))
    if a.shape[0] != b.shape[0] or (a.shape[1], b.shape[1]) != (len(first_MD), len(second_KD)):
        raise ConfigError(f"firings of {a.shape} and {b.shape} are not of these dictionaries, on the same rows")
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (first_MD, second_KD)]
    near = unit[0] @ unit[1].T > similar
    found = []
    for latent in np.flatnonzero(np.diff(a.indptr) >= LEAST_FIRINGS):
        rows = a.indices[a.indptr[latent] : a.indptr[latent + 1]]
        neighbours = np.flatnonzero(near[latent])
        fires = b[:, neighbours].tocsr()[rows].toarray()
        alone = float(fires.mean(0).max()) if len(neighbours) else 0.0
        together = float(fires.any(1).mean())
        split = len(neighbours) >= 2 and together >= covers > alone
        found.append([int(latent), len(neighbours), alone, together, split])
    return pd.DataFrame(found, columns=["latent", "neighbours", "alone", "together", "split"]).astype({"split": bool})


def against(
    first: tuple[Array, csr_matrix], others: Mapping[str, tuple[Array, csr_matrix]], **how: float
) -> pd.DataFrame:
    """Splits and merges between a dictionary and each of others: `dictionary`, `latents` and `splits` (of the first),
    `other_latents` and `merges` (of the other).

    Args:
        first, others: decoder rows and firings on the same rows, by name.
    """
    rows = []
    for name, (decoder, fires) in others.items():
        there, back = (
            splits(first[0], decoder, first[1], fires, **how),
            splits(decoder, first[0], fires, first[1], **how),
        )
        rows.append([name, len(there), int(there["split"].sum()), len(back), int(back["split"].sum())])
    return pd.DataFrame(rows, columns=["dictionary", "latents", "splits", "other_latents", "merges"])
