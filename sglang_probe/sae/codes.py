"""What an SAE makes of rows, kept sparse: of each row the latents that fire, and the part that is left over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_probe.errors import ConfigError
from sglang_probe.sae.sae import SAE

if TYPE_CHECKING:
    import torch
    from scipy.sparse import csr_matrix

Array = np.ndarray[Any, Any]
_BLOCK = 1024


@dataclass(frozen=True)
class Codes:
    """Codes of N rows in T texts by an SAE with M latents."""

    z_NM: csr_matrix
    """Activations, float32, zeros left out."""
    rest_ND: Array
    """Row minus reconstruction, float32."""
    text_N: Array
    """Number of the text of each row, int64."""
    texts: int

    @property
    def active(self) -> Array:
        """Latents that fire in each row, int64 `[N]`."""
        return np.diff(self.z_NM.indptr).astype(np.int64)

    @cached_property
    def fired_TM(self) -> Array:
        """Rows in which each latent fires, by text, int64 `[T, M]`."""
        latents = self.z_NM.shape[1]
        at = self.text_N[np.repeat(np.arange(self.z_NM.shape[0]), self.active)] * latents + self.z_NM.indices
        return np.bincount(at, minlength=self.texts * latents).reshape(self.texts, latents)

    @property
    def rows_T(self) -> Array:
        """Rows of each text, `[T]`."""
        return np.bincount(self.text_N, minlength=self.texts)

    @cached_property
    def mean_rest_TD(self) -> Array:
        """Mean of what is left over, by text, float64 `[T, D]`."""
        out = np.zeros((self.texts, self.rest_ND.shape[1]))
        np.add.at(out, self.text_N, self.rest_ND)
        return np.asarray(out / np.maximum(self.rows_T, 1)[:, None])


def codes(sae: SAE, batches: Iterable[torch.Tensor], text_N: Array, texts: int | None = None) -> Codes:
    """Encode rows.

    Args:
        batches: `[n, D]` each.
        text_N: number of the text of each row, from 0.
        texts: how many there are; default: up to the largest number.

    Raises:
        ConfigError: there are no rows, or labels are not as many as rows.
    """
    import torch
    from scipy.sparse import csr_matrix, vstack

    parts, rest = [], []
    with torch.no_grad():
        for batch in batches:
            for block in batch.split(_BLOCK):  # type: ignore[no-untyped-call]
                z, made = sae.encode_and_reconstruct(block)
                parts.append(csr_matrix(z.float().numpy()))
                rest.append((block.to(made.dtype) - made).float().numpy())
    n = sum(len(r) for r in rest)
    if not n or n != len(text_N):
        raise ConfigError(f"{n} rows with {len(text_N)} texts cannot be encoded")
    text = np.asarray(text_N, np.int64)
    return Codes(vstack(parts, "csr"), np.concatenate(rest), text, int(text.max()) + 1 if texts is None else texts)


def same_token_jaccard(first_NM: csr_matrix, second_NM: csr_matrix) -> Array:
    """Of each row, active latents in both over active latents in either, `[N]`: the same tokens computed twice, so a
    measure of numerics alone. 1 where none is active in either.

    Args:
        first_NM, second_NM: activations, or whether each latent fires; sparse, zeros left out, or dense.
    """
    from scipy.sparse import csr_matrix

    a, b = (csr_matrix(x).astype(bool).astype(np.int32) for x in (first_NM, second_NM))
    both = np.asarray(a.multiply(b).sum(1)).ravel()
    either = np.diff(a.indptr) + np.diff(b.indptr) - both
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))
