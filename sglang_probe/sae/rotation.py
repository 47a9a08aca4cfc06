"""Does a latent stand for the same direction in two regimes of rows?

Decoder rows do not move between regimes. What can turn is the part of a row that a latent answers for: its effective
direction, the mean of `x - x^ + z_i d_i` over the rows in which it fires, with what the dictionary left over. What it
leaves over in the text anyway, the mean of `x - x^` over all rows of the text, is taken off: it is not this latent's,
and where one latent turned all others would seem to.

Its cosine between regimes is far below 1 where nothing turned, because few rows make a noisy mean; and lower still for
a latent that fires in fewer rows of one regime. So of every text as many firings are taken in one regime as in the
other, and the cosine stands beside what it is with the regimes exchanged at random within texts, and between halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.sae.codes import Codes
from sglang_probe.stats.intervals import LEAST_CLUSTERS
from sglang_probe.stats.multiple import benjamini_hochberg

Array = np.ndarray[Any, Any]
LEAST_FIRINGS = 20


@dataclass(frozen=True)
class Rotation:
    """Cosines of effective directions between two regimes."""

    latents: pd.DataFrame
    """Of each latent with enough firings: `latent`, `firings` (taken in each regime), `cosine`, `exchanged` and
    `exchanged_low` (mean and 5 % quantile with regimes exchanged within texts), `p` (of a cosine as low), `q`."""
    summary: pd.DataFrame
    """The median (`statistic` `median`) and the 5 % quantile (`low`) over latents: `value`; `exchanged`,
    `exchanged_low`, `p` as above; and between halves of the texts `halves` (both of the first regime) beside
    `across` (one of either)."""


def rotation(
    first: Codes, second: Codes, decoder_MD: Array, *, draws: int = 999, splits: int = 50, seed: int = 0
) -> Rotation:
    """Compare the effective directions of latents in two regimes of the same texts.

    Args:
        decoder_MD: decoder rows of the SAE that made both codes.

    Raises:
        ConfigError: the texts or latents differ, or there are fewer than six texts.
    """
    texts, width = first.texts, first.z_NM.shape[1]
    if (texts, width) != (second.texts, second.z_NM.shape[1]) or texts < LEAST_CLUSTERS:
        raise ConfigError("directions are compared in two regimes of the same texts, at least six")
    rng = np.random.default_rng(seed)
    takes = np.minimum(first.fired_TM, second.fired_TM)
    tested = np.flatnonzero(takes.sum(0) >= LEAST_FIRINGS)
    of = [_firings(c, takes, rng) for c in (first, second)]
    signs = rng.integers(0, 2, (draws, texts)) * 2.0 - 1
    half = np.zeros((splits, texts))
    for row in half:
        row[rng.permutation(texts)[: texts // 2]] = 1
    observed, drawn = np.empty(len(tested)), np.empty((draws, len(tested)))
    halves, across = (np.full((splits, len(tested)), np.nan) for _ in range(2))
    for i, latent in enumerate(tested):
        a, b = (_sums(c, f[latent], decoder_MD[latent]) for c, f in zip((first, second), of, strict=True))
        observed[i], drawn[:, i] = _exchanged(a, b, signs)
        enough = np.minimum(half @ takes[:, latent], (1 - half) @ takes[:, latent]) >= LEAST_FIRINGS / 2
        here = half[enough]
        halves[enough, i] = _cosine(here @ a, (1 - here) @ a)
        across[enough, i] = _cosine(here @ a, (1 - here) @ b)
    p = (1 + (drawn <= observed + 1e-12).sum(0)) / (draws + 1)
    low = np.quantile(drawn, 0.05, axis=0) if len(tested) else observed
    latents = {"latent": tested, "firings": takes.sum(0)[tested], "cosine": observed, "exchanged": drawn.mean(0)}
    frame = pd.DataFrame({**latents, "exchanged_low": low, "p": p, "q": benjamini_hochberg(p)})
    return Rotation(frame, _summary(observed, drawn, halves, across))


def _summary(observed: Array, drawn: Array, halves: Array, across: Array) -> pd.DataFrame:
    rows = []
    for name, quantile in (("median", 0.5), ("low", 0.05)) if len(observed) else ():
        value, null = np.quantile(observed, quantile), np.quantile(drawn, quantile, axis=1)
        between = []
        for cosines in (halves, across):
            some = cosines[~np.isnan(cosines).all(1)]
            between.append(float(np.nanquantile(some, quantile, axis=1).mean()) if len(some) else float("nan"))
        p = (1 + (null <= value + 1e-12).sum()) / (len(null) + 1)
        rows.append([name, value, null.mean(), np.quantile(null, 0.05), p, *between])
    columns = ["statistic", "value", "exchanged", "exchanged_low", "p", "halves", "across"]
    return pd.DataFrame(rows, columns=columns)


def _firings(codes: Codes, takes_TM: Array, rng: np.random.Generator) -> list[tuple[Array, Array]]:
    """Of each latent rows in which it fires and its activations there, drawn so that text t gives `takes_TM[t]`."""
    by_latent = codes.z_NM.tocsc()
    latent = np.repeat(np.arange(by_latent.shape[1]), np.diff(by_latent.indptr))
    rows = by_latent.indices.astype(np.int64)
    text = codes.text_N[rows]
    order = np.lexsort((rng.random(len(rows)), text, latent))
    group = latent[order] * codes.texts + text[order]
    starts = np.searchsorted(group, group)
    kept = order[np.arange(len(order)) - starts < takes_TM.T.ravel()[group]]
    ends = np.searchsorted(latent[kept], np.arange(by_latent.shape[1] + 1))
    return [(rows[kept[s:e]], by_latent.data[kept[s:e]]) for s, e in pairwise(ends)]


def _sums(codes: Codes, firings: tuple[Array, Array], decoder_D: Array) -> Array:
    """Sum of the effective direction over a latent's firings, by text, `[T, D]`."""
    rows, z = firings
    out, text = np.zeros((codes.texts, len(decoder_D))), codes.text_N[rows]
    own = codes.rest_ND[rows] - codes.mean_rest_TD[text]
    np.add.at(out, text, own + z[:, None].astype(np.float64) * decoder_D)
    return out


def _exchanged(a_TD: Array, b_TD: Array, signs: Array) -> tuple[float, Array]:
    """Cosine of the sums of two regimes, and with the regimes exchanged in the texts whose sign is -1, `[draws]`."""
    total, apart = (a_TD + b_TD).sum(0), a_TD - b_TD
    gram, along, length = apart @ apart.T, apart @ total, float(total @ total)
    # The exchanged sums are (total + signs @ apart) / 2 and (total - signs @ apart) / 2.
    every = np.vstack([np.ones(signs.shape[1]), signs])
    square, inner = ((every @ gram) * every).sum(1), every @ along
    below = np.maximum((length + square) ** 2 - 4 * inner**2, 1e-300)
    found = (length - square) / np.sqrt(below)
    return float(found[0]), found[1:]


def _cosine(a: Array, b: Array) -> Array:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / np.maximum(norms, 1e-300))
