"""Rows of one or several runs as an SAE needs them: without sinks, each once, some held out, in an order of its own.

Which rows, and in which order, follows from the runs and the seed alone. The order of each phase is drawn by itself and
the phases are then interleaved by a fixed pattern, so that trainings with different shares of decode rows see the same
prefill rows in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.hashing import GOLDEN, mix64
from sglang_probe.run import batches
from sglang_probe.run.run import Run
from sglang_probe.sae.evaluation import Sinks

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
COLUMNS = ["run", "rid", "position", "token_id", "segment", "phase", "row"]
_READ = 65536


@dataclass(frozen=True)
class Harvested:
    """Rows of one hook point, in memory, `[N, D]` in the dtype in which they were recorded."""

    x_ND: torch.Tensor
    tokens: pd.DataFrame
    """Of each row: `run` (number of the run), `rid`, `position`, `token_id`, `segment`, `phase`, `family`."""
    left_out: pd.DataFrame
    """Rows that were left out, by `reason` and `segment`: `rows`."""
    norm_limit: float
    """Largest norm that was no sink's."""

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, share: float, seed: int = 0) -> tuple[Harvested, Harvested]:
        """All but a share of the families (of requests that share a prefix, or a document), and that share: by a hash
        of the family's name, at least one and not all.

        Raises:
            ConfigError: there is only one family.
        """
        names = sorted(self.tokens["family"].unique())
        if len(names) < 2:
            raise ConfigError(
                f"nothing can be held out: all {len(self)} rows are of one family of requests",
                fix="name other runs in `evaluate_on`",
            )
        out = self.tokens["family"].isin(held_out_families(names, share, seed)).to_numpy()
        return self.only(~out), self.only(out)

    def at_most(self, rows: int, seed: int = 0) -> Harvested:
        """So many of the rows, of one family after another in the order of their hashes: fewer documents, not documents
        with gaps. Of two numbers, the rows of the smaller are among those of the larger."""
        rank = {name: i for i, name in enumerate(_by_hash(self.tokens["family"].unique(), seed))}
        order = np.argsort(self.tokens["family"].map(rank).to_numpy(), kind="stable")
        return self.only(np.sort(order[:rows]))

    def only(self, which_N: Array) -> Harvested:
        """The rows that a mask or a list of places names."""
        import torch

        at = np.flatnonzero(which_N) if which_N.dtype == bool else which_N
        tokens = self.tokens.iloc[at].reset_index(drop=True)
        return Harvested(self.x_ND[torch.from_numpy(at)], tokens, self.left_out, self.norm_limit)

    def batches(self, size: int = _READ) -> Iterator[torch.Tensor]:
        """All rows in their order, float32 `[n, D]`."""
        for start in range(0, len(self), size):
            yield self.x_ND[start : start + size].float()


def harvested(
    runs: Sequence[Run],
    hook_point: str,
    *,
    where: str | None = None,
    weight: str | Path = "unique",
    sinks: Sinks | None = None,
    deduplicate: int = 0,
    seed: int = 0,
) -> Harvested:
    """Read the rows of runs.

    Args:
        where, weight: as `Run.iter_batches`.
        sinks: what is left out as attention sinks; default: position 0, and norms of 10 times the median.
        deduplicate: leave out a position if the same so many tokens ended at an earlier one; 0: do not.
        seed: of the choice of rows by fractional weights.

    Raises:
        ConfigError: no rows are left, or runs are of different models.
        RunDirectoryError: a run lacks the hook point, or `where` or the weights cannot be used.
    """
    import torch

    refuse_mixed_models(runs)
    sinks = sinks or Sinks()
    frames, rows = [], []
    for number, run in enumerate(runs):
        rng = np.random.default_rng([seed, number])
        chosen = batches.chosen(run, hook_point, where=where, weight=weight, rng=rng)
        families = run.requests().set_index("rid")["family"]
        family = chosen["rid"].map(families).fillna(chosen["rid"])
        frames.append(chosen.assign(run=number, family=family.to_numpy()))
        rows += [run.rows(hook_point, part) for part in _parts(chosen["row"].to_numpy())]
    tokens = pd.concat(frames, ignore_index=True)[[*COLUMNS, "family"]]
    x = torch.cat(rows) if rows else torch.empty((0, 0))
    if not len(tokens):
        raise ConfigError(f"the runs have no rows of `{hook_point}` that fit", fix="see `where` and `rows`")
    norms = torch.cat([part.float().norm(dim=1) for part in x.split(_READ)]).numpy()  # type: ignore[no-untyped-call]
    first = tokens["position"].to_numpy() < sinks.first_positions
    sink, limit = sinks.of(tokens["position"].to_numpy(), norms)
    reason = np.full(len(tokens), "", dtype=object)
    if deduplicate:
        reason[seen_before(tokens, deduplicate)] = "seen before"
    reason[sink & ~first] = "norm"
    reason[first] = "first position"
    kept = np.flatnonzero(reason == "")
    if not len(kept):
        raise ConfigError(f"all {len(tokens)} rows of `{hook_point}` were left out as sinks", fix="see `exclude`")
    gone = tokens[reason != ""].assign(reason=reason[reason != ""])
    left_out = gone.groupby(["reason", "segment"], as_index=False, sort=True).size().rename(columns={"size": "rows"})
    return Harvested(x[torch.from_numpy(kept)], tokens.iloc[kept].reset_index(drop=True), left_out, limit)


def held_out_families(names: Sequence[str], share: float, seed: int = 0) -> set[str]:
    """A share of two or more names, by their hashes: at least one, and not all."""
    return set(_by_hash(names, seed)[: min(max(1, round(share * len(names))), len(names) - 1)])


def joined(parts: Sequence[Harvested]) -> Harvested:
    """Rows of several harvests, one after another."""
    import torch

    left_out = pd.concat([p.left_out for p in parts], ignore_index=True)
    summed = left_out.groupby(["reason", "segment"], as_index=False, sort=True)["rows"].sum()
    tokens = pd.concat([p.tokens for p in parts], ignore_index=True)
    return Harvested(torch.cat([p.x_ND for p in parts]), tokens, summed, max(p.norm_limit for p in parts))


def refuse_mixed_models(runs: Sequence[Run]) -> None:
    """Refuse runs whose rows are of different weights.

    Raises:
        ConfigError: names two of them.
    """
    known = [(r, w) for r in runs if (w := (r.manifest.get("model") or {}).get("weights_sha256"))]
    for run, weights in known[1:]:
        if weights != known[0][1]:
            raise ConfigError(f"{known[0][0].path} and {run.path} are of models with different weights")


def seen_before(tokens: pd.DataFrame, length: int) -> Array:
    """Whether the `length` tokens that end at a position ended at an earlier one of the frame too, bool `[N]`. False
    where fewer of its request are in the frame, or their ids are not known."""
    ids = tokens["token_id"].to_numpy(np.int64)
    request = pd.factorize(pd.MultiIndex.from_frame(tokens[["run", "rid"]]))[0].astype(np.int64)
    position = tokens["position"].to_numpy(np.int64)
    words = mix64((ids + 1).astype(np.uint64) * GOLDEN)
    total = np.zeros(len(ids), dtype=np.uint64)
    whole = np.zeros(len(ids), dtype=bool)
    whole[length - 1 :] = True
    shifts = np.arange(length, dtype=np.uint64) * GOLDEN
    for back in range(length):
        n = len(ids) - back
        if n <= 0:
            break
        # The weight of a token depends on how far back it is: the sum is of the sequence, not of the set.
        total[back:] += mix64(words[:n] + shifts[back])
        together = (request[back:] == request[:n]) & (position[back:] - position[:n] == back) & (ids[:n] >= 0)
        whole[back:] &= together
    first = pd.Series(total[whole]).duplicated().to_numpy()
    out = np.zeros(len(ids), dtype=bool)
    out[np.flatnonzero(whole)[first]] = True
    return out


@dataclass(frozen=True)
class Schedule:
    """The endless order in which rows are trained on: batch s is rows `[s * size, (s + 1) * size)` of one epoch after
    another, so that any batch can be made without those before it."""

    phases: Sequence[Array]
    """Places of the rows of each phase."""
    shares: Sequence[float]
    """Of each phase in an epoch; they sum to 1."""
    seed: int
    _epochs: dict[int, Array] = field(default_factory=dict, repr=False, compare=False)

    @property
    def epoch_length(self) -> int:
        """Rows of one epoch: as many as the scarcest phase allows at its share."""
        return sum(self._counts())

    def batch(self, step: int, size: int) -> Array:
        """Places of the rows of a batch, int64 `[size]`."""
        first, length = step * size, self.epoch_length
        parts, at = [], first
        while at < first + size:
            epoch, inside = divmod(at, length)
            part = self.epoch(epoch)[inside : inside + first + size - at]
            parts.append(part)
            at += len(part)
        return np.concatenate(parts)

    def _counts(self) -> list[int]:
        most = min(len(p) / s for p, s in zip(self.phases, self.shares, strict=True) if s > 0)
        return [int(most * s + 1e-9) for s in self.shares]

    def epoch(self, number: int) -> Array:
        """Places of the rows of one epoch, in their order."""
        if number not in self._epochs:
            parts, places = [], []
            for phase, (rows, n) in enumerate(zip(self.phases, self._counts(), strict=True)):
                # The same generator whatever the shares: arms of a mixture see one order of each phase.
                rng = np.random.default_rng([self.seed, number, phase])
                parts.append(rng.permutation(rows)[:n])
                places.append((np.arange(n) + 0.5) / max(n, 1))
            order = np.argsort(np.concatenate(places), kind="stable")
            self._epochs.clear()
            self._epochs[number] = np.concatenate(parts)[order]
        return self._epochs[number]


def schedule(rows: Harvested, mix: Mapping[str, float] | None, seed: int) -> Schedule:
    """The order of training.

    Args:
        mix: share of each phase; default: as they are.

    Raises:
        ConfigError: a phase of the mix has no rows, or the shares do not sum to 1.
    """
    if mix is None:
        return Schedule([np.arange(len(rows))], [1.0], seed)
    if any(s < 0 for s in mix.values()) or abs(sum(mix.values()) - 1) > 1e-6:
        raise ConfigError(f"the shares of `mix` sum to {sum(mix.values()):g}, not to 1")
    there = rows.tokens["phase"].to_numpy()
    places = [np.flatnonzero(there == phase) for phase in mix]
    if empty := [p for p, at in zip(mix, places, strict=True) if not len(at) and mix[p] > 0]:
        raise ConfigError(f"`mix: {empty[0]}`: there are no rows of that phase", fix=f"there are {set(there)}")
    return Schedule(places, list(mix.values()), seed)


def _by_hash(names: Iterable[str], seed: int) -> list[str]:
    return sorted(names, key=lambda n: hashlib.sha256(f"{seed} {n}".encode()).digest())


def _parts(rows: Array) -> Iterator[Array]:
    for start in range(0, len(rows), _READ):
        yield rows[start : start + _READ]
