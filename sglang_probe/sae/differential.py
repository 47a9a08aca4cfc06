"""Which latents differ between two groups of texts: by how often they fire, by how strongly, and beyond their tokens.

The unit is a text (or a family of texts), not a token: tokens of one text are alike, and a test over tokens finds what
one long text has. Each unit has one rate per latent, and all units weigh the same. Groups are exchanged over units
(a permutation test; within the unit where each has rows of both), which is exact whatever the rates look like.

*Within matched tokens*: from each firing the share is taken with which the latent fires on that token id in all rows
of both groups. What is left has no difference if the groups differ in their tokens alone, because a latent that fires
on a token fires on it in either group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.stats.multiple import benjamini_hochberg

Array = np.ndarray[Any, Any]
PERMUTATIONS = 20_000
_BLOCK = 2000


@dataclass(frozen=True)
class Units:
    """What each of U units has in each of its groups; a unit of paired groups is there once."""

    names: list[str]
    group: Array
    """Group of each unit, 0 or 1, int64 `[U]`; -1 in paired designs, whose values are differences, 1 minus 0."""
    rate: Array
    """Share of its rows in which each latent fires, float64 `[U, M]`; a difference in paired designs."""
    mean: Array
    """Mean activation over its rows, `[U, M]`, likewise."""
    matched: Array
    """Rate beyond that of its tokens, `[U, M]`, likewise."""
    fires_in: Array
    """Whether each latent fires in the unit at all, bool `[U, M]`."""
    left_out: int
    """Units of a paired design with rows of one group only; of an unpaired one with rows of both."""

    @property
    def paired(self) -> bool:
        """Whether every unit has rows of both groups."""
        return bool(len(self.group)) and bool((self.group < 0).all())

    def only(self, which: Array) -> Units:
        """Some of the units."""
        names = [n for n, w in zip(self.names, which, strict=True) if w]
        columns = ("group", "rate", "mean", "matched", "fires_in")
        return replace(self, names=names, **{c: getattr(self, c)[which] for c in columns})

    def halves(self, seed: int = 0) -> tuple[Units, Units]:
        """Units to discover with and units to confirm with, each with half of either group."""
        rng = np.random.default_rng(seed)
        first = np.zeros(len(self.names), dtype=bool)
        for g in np.unique(self.group):
            at = rng.permutation(np.flatnonzero(self.group == g))
            first[at[: (len(at) + 1) // 2]] = True
        return self.only(first), self.only(~first)

    def relabelled(self, rng: np.random.Generator) -> Units:
        """The same units with their groups exchanged at random: data in which nothing differs."""
        if self.paired:
            sign = rng.choice([-1.0, 1.0], len(self.names))[:, None]
            return replace(self, rate=self.rate * sign, mean=self.mean * sign, matched=self.matched * sign)
        return replace(self, group=rng.permutation(self.group))


def units_of(codes: Any, token_N: Array, unit_N: Array, group_N: Array) -> Units:
    """Rates and means of units.

    Args:
        codes: activations, scipy CSR `[N, M]`.
        unit_N: name of the unit of each row.
        group_N: 0, 1, or -1 of rows that are of neither.

    Raises:
        ConfigError: there are fewer than four units of a group.
    """
    from scipy import sparse

    rows = np.flatnonzero(group_N >= 0)
    codes, token, group = codes[rows], token_N[rows], group_N[rows]
    names, unit = np.unique(unit_N[rows].astype(str), return_inverse=True)
    cell, code = np.unique(unit * 2 + group, return_inverse=True)
    ones = np.ones(len(rows))
    member = sparse.csr_array((ones, (code, np.arange(len(rows)))), shape=(len(cell), len(rows)))
    count = np.bincount(code, minlength=len(cell))[:, None]
    fires = codes.copy().astype(np.float64)
    fires.data = np.ones_like(fires.data)
    known, kind = np.unique(token, return_inverse=True)
    tokens = sparse.csr_array((ones, (kind, np.arange(len(rows)))), shape=(len(known), len(rows)))
    share = (tokens @ fires).tocsr()
    share = sparse.diags_array(1 / np.bincount(kind)) @ share
    fired = (member @ fires).toarray()
    expected = ((member @ tokens.T) @ share).toarray()
    rate, matched = fired / count, (fired - expected) / count
    mean = (member @ codes).toarray() / count
    of, side = cell // 2, cell % 2
    per_unit = np.bincount(of, minlength=len(names))
    both = np.flatnonzero(per_unit == 2)
    if 2 * len(both) >= len(names):
        if len(both) < 4:
            raise ConfigError(f"{len(both)} texts have rows of both groups", fix="at least four are needed")
        at = {(u, s): i for i, (u, s) in enumerate(zip(of.tolist(), side.tolist(), strict=True))}
        a, b = (np.array([at[u, s] for u in both.tolist()]) for s in (0, 1))
        d_rate, d_mean, d_matched = (x[b] - x[a] for x in (rate, mean, matched))
        there = (fired[a] + fired[b]) > 0
        left_out = len(names) - len(both)
        units = [str(names[u]) for u in both]
        return Units(units, np.full(len(both), -1), d_rate, d_mean, d_matched, there, left_out)
    alone = per_unit[of] == 1
    of, side, rate, mean, matched, fired = (x[alone] for x in (of, side, rate, mean, matched, fired))
    sizes = np.bincount(side, minlength=2)
    if sizes.min() < 4:
        raise ConfigError(f"the groups have {sizes[0]} and {sizes[1]} texts", fix="at least four of each are needed")
    return Units([str(names[u]) for u in of], side.astype(np.int64), rate, mean, matched, fired > 0, len(both))


def difference(values_UM: Array, group_U: Array) -> Array:
    """Mean of group 1 minus mean of group 0 `[M]`; of a paired design, mean of the differences."""
    if (group_U < 0).all():
        return np.asarray(values_UM.mean(0))
    return np.asarray(values_UM[group_U == 1].mean(0) - values_UM[group_U == 0].mean(0))


def smallest_p(group_U: Array, permutations: int) -> float:
    """The least two-sided p that `permutation_p` can give: one over the draws, or what so few units allow."""
    from math import comb

    units = len(group_U)
    ways = 2.0**units if (group_U < 0).all() else float(comb(units, int((group_U == 1).sum())))
    # The mirror image of the best exchange is as far from zero, save where one group is the larger.
    both = 1.0 if not (group_U < 0).all() and 2 * int((group_U == 1).sum()) != units else 2.0
    return max(1 / (permutations + 1), both / ways)


def permutation_p(values_UM: Array, group_U: Array, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Array:
    """Two-sided p of the difference of each column, `[M]`, groups exchanged over units; the observed labelling counts
    (Phipson and Smyth 2010), so that no p is 0."""
    rng = np.random.default_rng([seed, 5])
    units = len(group_U)
    observed = np.abs(difference(values_UM, group_U))
    reach = observed - 1e-12 * np.abs(values_UM).sum(0)  # sums of the same numbers in another order are equal
    paired = bool((group_U < 0).all())
    n1 = int((group_U == 1).sum())
    weights = np.full(units, 1 / units) if paired else np.where(group_U == 1, 1 / max(n1, 1), -1 / max(units - n1, 1))
    hits = np.ones(values_UM.shape[1])
    for start in range(0, permutations, _BLOCK):
        n = min(_BLOCK, permutations - start)
        if paired:
            drawn = rng.choice([-1.0, 1.0], (n, units)) / units
        else:
            drawn = rng.permuted(np.tile(weights, (n, 1)), axis=1)
        hits += (np.abs(drawn @ values_UM) >= reach).sum(0)
    return np.asarray(hits / (permutations + 1))


@dataclass(frozen=True)
class Found:
    """A row for each latent that was tested, and what shuffled groups give."""

    frame: pd.DataFrame
    """`latent`, `rate_a`, `rate_b` (of unpaired groups), `difference` (B minus A), `mean_difference`, `matched`,
    `standardised` (difference over its standard deviation between units), `p`, `q`, `discovered`, `p_confirm`,
    `q_confirm`, `confirmed`, `p_matched`, `q_matched`, `beyond_tokens`."""
    tested: int
    together: int
    """As many latents must have the smallest p there can be before one is discovered: 1 where single ones can be."""
    discovered: int
    confirmed: int
    null_discovered: list[int]
    """Latents that are discovered where the groups of the discovery half are exchanged at random."""
    null_confirmed: list[int]
    """Latents that both halves confirm, groups of both exchanged at random."""


@dataclass(frozen=True)
class FalseDiscoveries:
    """What the comparison makes of two random halves of the texts of one group, in which nothing differs."""

    group: int
    units: int
    """Of both halves together."""
    discovered: list[int]
    """Latents, by split."""
    confirmed: list[int]


def false_discoveries(
    codes: Any,
    token_N: Array,
    unit_N: Array,
    group_N: Array,
    *,
    splits: int = 20,
    q: float = 0.05,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[FalseDiscoveries]:
    """Put random halves of either group's units through `units_of` and `compare`. Groups too small for it are left out.

    Args:
        splits: of each group.
    """
    rng = np.random.default_rng([seed, 7])
    names, unit = np.unique(unit_N.astype(str), return_inverse=True)
    found = []
    for g in (0, 1):
        here = np.unique(unit[group_N == g])
        if len(here) < 8:
            continue
        told = FalseDiscoveries(g, len(here), [], [])
        for split in range(splits):
            side = np.full(len(names), -1)
            side[here] = rng.permutation(np.arange(len(here)) % 2)
            half = np.where(group_N == g, side[unit], -1)
            units = units_of(codes, token_N, unit_N, half)
            one = compare(units, q=q, permutations=permutations, nulls=0, seed=seed + split)
            told.discovered.append(one.discovered)
            told.confirmed.append(one.confirmed)
        found.append(told)
    return found


def compare(
    units: Units,
    *,
    q: float = 0.05,
    least: int = 4,
    permutations: int = PERMUTATIONS,
    nulls: int = 20,
    seed: int = 0,
) -> Found:
    """Discover on half of the units, confirm on the other half.

    Args:
        q: false discovery rate, of the discoveries and of the confirmations.
        least: units in which a latent must fire to be tested; does not look at the groups.
        nulls: random exchanges of the groups that are put through the same tests.

    Raises:
        ConfigError: a half has fewer than two units of a group.
    """
    first, second = units.halves(seed)
    for half in (first, second):
        sizes = [len(half.names)] if units.paired else [int((half.group == g).sum()) for g in (0, 1)]
        if min(sizes) < 2:
            raise ConfigError("there are too few texts for a half to discover with and a half to confirm with")
    tested = np.flatnonzero(first.fires_in.sum(0) >= least)
    frame = _pipeline(first, second, tested, q, permutations, seed)
    rng = np.random.default_rng([seed, 6])
    null = [
        _pipeline(first.relabelled(rng), second.relabelled(rng), tested, q, permutations, seed) for _ in range(nulls)
    ]
    every = units.rate[:, tested]
    frame.insert(1, "difference", difference(every, units.group))
    frame.insert(2, "mean_difference", difference(units.mean[:, tested], units.group))
    frame.insert(3, "matched", difference(units.matched[:, tested], units.group))
    if not units.paired:
        frame.insert(1, "rate_a", every[units.group == 0].mean(0))
        frame.insert(2, "rate_b", every[units.group == 1].mean(0))
    frame.insert(
        frame.columns.get_loc("matched") + 1, "standardised", frame["difference"] / _spread(every, units.group)
    )
    together = int(np.ceil(len(tested) * smallest_p(first.group, permutations) / q))
    return Found(
        frame,
        len(tested),
        max(together, 1),
        int(frame["discovered"].sum()),
        int(frame["confirmed"].sum()),
        [int(f["discovered"].sum()) for f in null],
        [int(f["confirmed"].sum()) for f in null],
    )


def _pipeline(first: Units, second: Units, tested: Array, q: float, permutations: int, seed: int) -> pd.DataFrame:
    how = {"permutations": permutations, "seed": seed}
    p = permutation_p(first.rate[:, tested], first.group, **how)
    p_mean = permutation_p(first.mean[:, tested], first.group, **how)
    adjusted = benjamini_hochberg(p)
    discovered = adjusted <= q
    confirm, matched = np.full(len(tested), np.nan), np.full(len(tested), np.nan)
    at = tested[discovered]
    same = np.zeros(len(tested), dtype=bool)
    if len(at):
        confirm[discovered] = permutation_p(second.rate[:, at], second.group, **how)
        matched[discovered] = permutation_p(second.matched[:, at], second.group, **how)
        signs = [np.sign(difference(h.rate[:, at], h.group)) for h in (first, second)]
        same[discovered] = signs[0] == signs[1]
    q_confirm, q_matched = benjamini_hochberg(confirm), benjamini_hochberg(matched)
    confirmed = same & (q_confirm <= q)
    return pd.DataFrame(
        {
            "latent": tested,
            "p": p,
            "p_mean": p_mean,
            "q": adjusted,
            "discovered": discovered,
            "p_confirm": confirm,
            "q_confirm": q_confirm,
            "confirmed": confirmed,
            "p_matched": matched,
            "q_matched": q_matched,
            "beyond_tokens": confirmed & (q_matched <= q),
        }
    )


def _spread(values_UM: Array, group_U: Array) -> Array:
    """Standard deviation between units, within groups, `[M]`."""
    if (group_U < 0).all():
        spread = values_UM.std(0, ddof=1)
    else:
        parts = [values_UM[group_U == g] for g in (0, 1)]
        freedom = sum(len(p) - 1 for p in parts)
        spread = np.sqrt(sum(p.var(0) * len(p) for p in parts) / freedom)
    return np.where(spread > 0, spread, np.nan)
