"""How alike two dictionaries are: the best one-to-one matching of their latents, beside what chance gives.

MCC: mean absolute cosine of matched decoder rows (Hungarian method), as in "Mechanistic Interpretability Should
Prioritize Feature Consistency in SAEs" (2505.20254); shared latents as in Paulo and Belrose (2501.16615): those whose
decoder and encoder matchings agree. Latents that never fire have no meaning to be compared, so give alive ones only.
The value under chance depends on width and number of latents: it is computed every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.sae.sae import SAE

Array = np.ndarray[Any, Any]
SIMILAR = 0.7


@dataclass(frozen=True)
class Match:
    """The best matching of the smaller dictionary's latents into the larger one's."""

    first: Array
    """Latents of the first dictionary, int64 `[n]`."""
    second: Array
    """Their partners in the second, `[n]`."""
    cosine: Array
    """Absolute cosine of each pair, `[n]`."""

    @property
    def mcc(self) -> float:
        """Mean absolute cosine."""
        return float(self.cosine.mean())

    def share_above(self, bar: float = SIMILAR) -> float:
        """Share of pairs whose cosine is above."""
        return float((self.cosine > bar).mean())


def match(first_MD: Array, second_MD: Array) -> Match:
    """Match rows of two matrices one to one so that the sum of absolute cosines is largest.

    Raises:
        ConfigError: they have different widths, or one has no row, or a row of length 0.
    """
    from scipy.optimize import linear_sum_assignment

    cosine = np.abs(_unit(first_MD) @ _unit(second_MD).T) if first_MD.shape[1] == second_MD.shape[1] else None
    if cosine is None or not cosine.size:
        raise ConfigError(f"dictionaries of shapes {first_MD.shape} and {second_MD.shape} cannot be matched")
    first, second = linear_sum_assignment(cosine, maximize=True)
    return Match(first, second, cosine[first, second])


def chance(first_MD: Array, second_MD: Array, *, rotations: int = 5, seed: int = 0) -> Array:
    """MCC with the second dictionary turned at random, `[rotations]`: all angles within each dictionary stay, and
    nothing between them is left."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(rotations):
        q, r = np.linalg.qr(rng.normal(size=(second_MD.shape[1],) * 2))
        found.append(match(first_MD, second_MD @ (q * np.sign(np.diag(r)))).mcc)  # Haar measure: Mezzadri 2007
    return np.array(found)


def compare(a: SAE, b: SAE, alive_a: Array, alive_b: Array, *, rotations: int = 5, seed: int = 0) -> dict[str, Any]:
    """Two SAEs of one hook point: MCC of decoders and of encoders, share above 0.7, share shared, and the MCC under
    chance.

    Args:
        alive_a, alive_b: latents that fire on the evaluation rows, bool `[M]` or indices.
    """
    first, second = (_places(x) for x in (alive_a, alive_b))
    decoders = [s.W_dec.double().numpy()[at] for s, at in ((a, first), (b, second))]
    encoders = [s.W_enc.double().numpy().T[at] for s, at in ((a, first), (b, second))]
    by_decoder, by_encoder = match(*decoders), match(*encoders)
    partner = dict(zip(by_encoder.first.tolist(), by_encoder.second.tolist(), strict=True))
    pairs = zip(by_decoder.first.tolist(), by_decoder.second.tolist(), strict=True)
    agree = np.array([partner.get(i) == j for i, j in pairs])
    null = chance(*decoders, rotations=rotations, seed=seed)
    return {
        "alive_first": len(first),
        "alive_second": len(second),
        "mcc": by_decoder.mcc,
        "mcc_chance": float(null.mean()),
        "mcc_chance_most": float(null.max()),
        "above_0.7": by_decoder.share_above(),
        "mcc_encoder": by_encoder.mcc,
        "shared": float(agree.mean()),
    }


def cosine_by_index(a: SAE, b: SAE, which: Array | Sequence[int]) -> pd.DataFrame:
    """Cosine of latent i of one dictionary with latent i of the other, for dictionaries that began alike: `latent`,
    `decoder`, `encoder`."""
    at = _places(np.asarray(which))
    pairs = [(s.W_dec.double().numpy()[at], s.W_enc.double().numpy().T[at]) for s in (a, b)]
    (dec_a, enc_a), (dec_b, enc_b) = ((_unit(d), _unit(e)) for d, e in pairs)
    return pd.DataFrame({"latent": at, "decoder": (dec_a * dec_b).sum(1), "encoder": (enc_a * enc_b).sum(1)})


def _places(which: Array) -> Array:
    return np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)


def _unit(rows: Array) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if len(rows) and not norms.min() > 0:
        raise ConfigError(f"row {int(norms.argmin())} of a dictionary has length 0 and no direction")
    return np.asarray(rows / norms)
