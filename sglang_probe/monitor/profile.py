"""What is usual: a reference profile, how unusual a trajectory is by it, and KL by dimension for triage.

The trajectories of the reference are split by family (of requests that share a prefix). One half is *fitted to*:
centres, spreads, principal components. The other half, which nothing was fitted to, is what scores are ranked against:
that is what makes the ranks of `conformal.py` valid.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.monitor.trajectories import Trajectories

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
COMPONENTS = 32
"""Principal components of rows within which the Mahalanobis distance is taken."""
LEAST = 12
"""Trajectories of a reference: six to fit to, six to rank against. Ranks among so few say little; see the notes of the
study."""
_NORMAL = 1.4826
"""Standard deviation of a normal distribution in median absolute deviations."""


@dataclass(frozen=True)
class Profile:
    """What is usual in a reference."""

    centre: pd.Series
    """Median of each statistic over the fitted trajectories."""
    spread: pd.Series
    """Their median absolute deviation, as a standard deviation."""
    reference: pd.DataFrame
    """Scores of the trajectories that nothing was fitted to, a column a statistic."""
    quantiles: pd.DataFrame
    """Of each column over all rows of the reference: `column`, `rows`, `mean`, `sd`, and quantiles `q01` ... `q99`."""
    whitening: tuple[Array, Array] | None
    """Mean `[D]` and whitened components `[D, C]` of the fitted rows; None where there are no rows."""

    @property
    def statistics(self) -> list[str]:
        """What is known of a trajectory: `COLUMN mean` and `COLUMN max` of every column, and `mahalanobis`."""
        return list(self.centre.index)

    def scores(self, of: Trajectories) -> pd.DataFrame:
        """How unusual each trajectory is, a column a statistic: its distance from the usual median, to either side, in
        usual spreads."""
        return ((_statistics(of, self.whitening) - self.centre) / self.spread).abs()

    def score(self, values_NK: Array, far_N: Array | None, weight_N: Array | None = None) -> Array:
        """The same of one trajectory, float64 `[S]` in the order of `statistics`.

        Args:
            values_NK, weight_N: as of `statistics_of`. far_N: `distances` of its rows.
        """
        told = statistics_of(values_NK, far_N, weight_N)
        return np.abs((told - self.centre.to_numpy(np.float64)) / self.spread.to_numpy(np.float64))


def profile(reference: Trajectories, seed: int = 0) -> tuple[Profile, Trajectories, Trajectories]:
    """The profile, and the two halves: fitted to, and ranked against.

    Raises:
        ConfigError: fewer than `LEAST` families.
    """
    fitted, ranked = halves(reference, seed)
    if min(len(fitted), len(ranked)) < LEAST // 2:
        raise ConfigError(
            f"a reference of {len(reference)} trajectories, of which {min(len(fitted), len(ranked))} are on one side "
            f"of the split by family: {LEAST // 2} are the least",
            fix="record more requests, of more families",
        )
    whitening = None if fitted.x_ND is None else _whitening(fitted.x_ND)
    told = _statistics(fitted, whitening)
    centre = told.median()
    spread = (told - centre).abs().median() * _NORMAL
    # What never varies in the reference is unusual by any difference at all.
    spread = spread.where(spread > 0, np.maximum(told.std().fillna(0), 1e-12))
    bare = Profile(centre, spread, pd.DataFrame(), _quantiles(reference), whitening)
    return Profile(centre, spread, bare.scores(ranked), bare.quantiles, whitening), fitted, ranked


def halves(of: Trajectories, seed: int = 0) -> tuple[Trajectories, Trajectories]:
    """Two halves without a common family, by a hash of the families' names."""
    names = of.frame["family"].astype(str)
    order = sorted(names.unique(), key=lambda n: hashlib.sha256(f"{seed} {n}".encode()).digest())
    first = names.isin(order[: len(order) // 2]).to_numpy()
    return of.only(first), of.only(~first)


def kl_by_dimension(rows_NK: Array, reference_NK: Array) -> Array:
    """KL divergence of two normal distributions with the means and variances of the columns, `[K]` in nats:
    `(s^2 + (m - m0)^2) / (2 s0^2) - 1/2 + ln(s0 / s)`.

    **For triage alone.** Without any change its expected value is about 1/n for n independent rows, and several times
    that for rows of the same texts: it has no threshold. A column that does not vary has none (NaN).
    """
    m, m0 = np.nanmean(rows_NK, 0), np.nanmean(reference_NK, 0)
    v, v0 = np.nanvar(rows_NK, 0), np.nanvar(reference_NK, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (v + (m - m0) ** 2) / (2 * v0) - 0.5 + 0.5 * np.log(v0 / v)
    return np.where((v > 0) & (v0 > 0), found, np.nan)


def statistics_of(values_NK: Array, far_N: Array | None, weight_N: Array | None = None) -> Array:
    """Mean of every column, maximum of every column, and the mean squared distance, of one trajectory; `[2 K (+ 1)]`.

    Args:
        values_NK: numbers of its rows; NaN: unknown. far_N: `distances` of its rows; None: there are none.
        weight_N: one over the probability with which each row was read, where that is not the same for all.
    """
    known = ~np.isnan(values_NK)
    weight = np.ones(len(values_NK)) if weight_N is None else weight_N
    with np.errstate(invalid="ignore", divide="ignore"):
        total = (known * weight[:, None]).sum(0)
        mean = np.where(known, values_NK * weight[:, None], 0.0).sum(0) / total
        most = np.where(known, values_NK, -np.inf).max(0, initial=-np.inf)
    most = np.where(known.any(0), most, np.nan)
    if far_N is None:
        return np.concatenate([mean, most])
    told = np.isfinite(far_N)
    far = float((far_N * weight)[told].sum() / weight[told].sum()) if told.any() else np.nan
    return np.concatenate([mean, most, [far]])


def distances(x_ND: torch.Tensor, whitening: tuple[Array, Array]) -> Array:
    """Squared Mahalanobis distance of rows within the components, float64 `[N]`."""
    mean, components = whitening
    parts = [
        np.square((part.float().numpy() - mean) @ components).sum(1)
        for part in x_ND.split(8192)  # type: ignore[no-untyped-call]
    ]
    return np.concatenate(parts).astype(np.float64) if parts else np.empty(0)


def _statistics(of: Trajectories, whitening: tuple[Array, Array] | None) -> pd.DataFrame:
    names = [*(f"{n} mean" for n in of.names), *(f"{n} max" for n in of.names)]
    far = None if whitening is None or of.x_ND is None else distances(of.x_ND, whitening)
    if far is not None:
        names.append("mahalanobis")
    order = np.argsort(of.of_N, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(of.of_N, minlength=len(of)))[:-1]) if len(of) else []
    weight = of.weight_N
    told = [
        statistics_of(of.values_NK[at], None if far is None else far[at], None if weight is None else weight[at])
        for at in rows
    ]
    return pd.DataFrame(np.array(told).reshape(len(of), len(names)), columns=names)


def _whitening(x_ND: torch.Tensor) -> tuple[Array, Array]:
    """Mean and leading principal components, scaled so that projections have variance 1."""
    x = x_ND.float().numpy().astype(np.float64)
    mean = x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x - mean, rowvar=False))
    first = np.argsort(values)[::-1][: min(COMPONENTS, len(x) - 1, x.shape[1])]
    first = first[values[first] > 1e-12 * values.max()]
    return mean, vectors[:, first] / np.sqrt(values[first])


def _quantiles(of: Trajectories) -> pd.DataFrame:
    x = of.values_NK
    told = {"column": list(of.names), "rows": (~np.isnan(x)).sum(0), "mean": np.nanmean(x, 0), "sd": np.nanstd(x, 0)}
    found = np.nanquantile(x, QUANTILES, axis=0)
    return pd.DataFrame({**told, **{f"q{round(q * 100):02d}": f for q, f in zip(QUANTILES, found, strict=True)}})
