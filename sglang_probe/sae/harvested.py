"""Rows of one or several runs as an SAE needs them: without sinks, each once, some held out. Which rows follows from
the runs and the seed alone; in which order they are trained on, see `schedule.py`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
_READ_BYTES = 4 << 20
_NAMES = ("rid", "segment", "phase", "family")


@dataclass(frozen=True)
class Listed:
    """Rows of one hook point that were chosen, and lie in their runs."""

    runs: Sequence[Run]
    hook_point: str
    tokens: pd.DataFrame
    """Of each row: `run` (number of the run), `rid`, `position`, `token_id`, `segment`, `phase`, `row`, `family`; in 36
    bytes: names are categories."""
    left_out: pd.DataFrame
    """Rows that were left out, by `reason` and `segment`: `rows`."""
    norm_limit: float
    """Largest norm that was no sink's."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def layout(self) -> tuple[int, torch.dtype]:
        """Width, and the dtype that holds the rows of all the runs."""
        import torch

        found = [r.row_layout(self.hook_point) for i, r in enumerate(self.runs) if (self.tokens["run"] == i).any()]
        return found[0][0], functools.reduce(torch.promote_types, [dtype for _, dtype in found])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""
        width, dtype = self.layout
        return width * dtype.itemsize

    def split(self, share: float, seed: int = 0) -> tuple[Listed, Listed]:
        """As `Harvested.split`."""
        out = _out(self.tokens["family"], share, seed)
        return self.only(~out), self.only(out)

    def at_most(self, rows: int, seed: int = 0) -> Listed:
        """So many of the rows, of one family after another in the order of their hashes: fewer documents, not documents
        with gaps. Of two numbers, the rows of the smaller are among those of the larger."""
        rank = {name: i for i, name in enumerate(_by_hash(self.tokens["family"].unique(), seed))}
        order = np.argsort(self.tokens["family"].map(rank).to_numpy(), kind="stable")
        return self.only(np.sort(order[:rows]))

    def only(self, which_N: Array) -> Listed:
        """The rows that a mask or a list of places names."""
        at = np.flatnonzero(which_N) if which_N.dtype == bool else which_N
        return replace(self, tokens=self.tokens.iloc[at].reset_index(drop=True))

    def read(self, places: Array | None = None) -> torch.Tensor:
        """Rows by their places, `[n, D]` in the dtype in which they were recorded; all of them by default. Takes the
        memory of what it returns."""
        import torch

        width, dtype = self.layout
        number, row = (self.tokens[c].to_numpy() for c in ("run", "row"))
        number, row = (number, row) if places is None else (number[places], row[places])
        out = torch.empty((len(row), width), dtype=dtype)
        for i, run in enumerate(self.runs):
            at = np.flatnonzero(number == i)
            if len(at) and run.row_layout(self.hook_point)[1] == dtype:
                run.rows_into(self.hook_point, row[at], out, at)
            for part in _parts(at) if len(at) and run.row_layout(self.hook_point)[1] != dtype else ():
                out[torch.from_numpy(part)] = run.rows(self.hook_point, row[part]).to(dtype)
        return out

    def batches(self, places: Array | None = None) -> Iterator[torch.Tensor]:
        """Rows by their places, all of them by default, in their order, float32 `[n, D]`, 4 MiB at a time."""
        size = max(1, _READ_BYTES // (4 * self.layout[0]))
        places = np.arange(len(self)) if places is None else places
        for start in range(0, len(places), size):
            yield self.read(places[start : start + size]).float()

    def loaded(self) -> Harvested:
        """The rows in memory."""
        plain = self.tokens.astype({"run": np.int64, "position": np.int64, **dict.fromkeys(_NAMES, "str")})
        return Harvested(self.read(), plain, self.left_out, self.norm_limit)


@dataclass(frozen=True)
class Harvested:
    """Rows of one hook point, in memory, `[N, D]` in the dtype in which they were recorded."""

    x_ND: torch.Tensor
    tokens: pd.DataFrame
    """As `Listed.tokens`, with names as text."""
    left_out: pd.DataFrame
    norm_limit: float

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, share: float, seed: int = 0) -> tuple[Harvested, Harvested]:
        """All but a share of the families (of requests that share a prefix, or a document), and that share: by a hash
        of the family's name, at least one and not all.

        Raises:
            ConfigError: there is only one family.
        """
        out = _out(self.tokens["family"], share, seed)
        return self.only(~out), self.only(out)

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


def listed(
    runs: Sequence[Run],
    hook_point: str,
    *,
    where: str | None = None,
    weight: str | Path = "unique",
    sinks: Sinks | None = None,
    deduplicate: int = 0,
    seed: int = 0,
) -> Listed:
    """Choose the rows of runs. Their norms are read for it, and nothing is kept of them.

    Args:
        where, weight: as `Run.iter_batches`.
        sinks: what is left out as attention sinks; default: position 0, and norms of 10 times the median.
        deduplicate: leave out a position if the same so many tokens ended at an earlier one; 0: do not.
        seed: of the choice of rows by fractional weights.

    Raises:
        ConfigError: no rows are left, or runs are of different models.
        RunDirectoryError: a run lacks the hook point, or `where` or the weights cannot be used.
    """
    refuse_mixed_models(runs)
    sinks = sinks or Sinks()
    columns: dict[str, list[Array]] = {name: [] for name in [*COLUMNS, "family"]}
    names: dict[str, dict[str, int]] = {name: {} for name in _NAMES}
    for number, run in enumerate(runs):
        rng = np.random.default_rng([seed, number])
        families = run.requests().set_index("rid")["family"]
        for chosen in batches.chosen_in_parts(run, hook_point, where=where, weight=weight, rng=rng):
            family = chosen["rid"].map(families).fillna(chosen["rid"])
            for name, values in chosen.assign(run=number, family=family.to_numpy())[list(columns)].items():
                kind = np.int64 if name == "row" else np.int32
                of = _coded(values, names[str(name)]) if name in _NAMES else values.to_numpy(kind)
                columns[str(name)].append(of)
    tokens = pd.DataFrame({name: _joined(columns.pop(name), names.get(name)) for name in list(columns)})
    if not len(tokens):
        raise ConfigError(f"the runs have no rows of `{hook_point}` that fit", fix="see `where` and `rows`")
    every = Listed(runs, hook_point, tokens, pd.DataFrame(), float("inf"))
    position = tokens["position"].to_numpy()
    first = position < sinks.first_positions
    norms = np.zeros(len(tokens), np.float32)
    if sinks.norm_multiple is not None and not first.all():
        inner, done = np.flatnonzero(~first), 0
        for x in every.batches(inner):  # a list of their norms would keep the heap from shrinking between batches
            norms[inner[done : done + len(x)]] = x.norm(dim=1).numpy()
            done += len(x)
    sink, limit = sinks.of(position, norms)
    reason = np.full(len(tokens), "", dtype=object)
    if deduplicate:
        reason[seen_before(tokens, deduplicate)] = "seen before"
    reason[sink & ~first] = "norm"
    reason[first] = "first position"
    kept = np.flatnonzero(reason == "")
    if not len(kept):
        raise ConfigError(f"all {len(tokens)} rows of `{hook_point}` were left out as sinks", fix="see `exclude`")
    gone = tokens[reason != ""].assign(reason=reason[reason != ""])
    gone = gone.astype({"segment": "str"})
    left_out = gone.groupby(["reason", "segment"], as_index=False, sort=True).size().rename(columns={"size": "rows"})
    return replace(every.only(kept), left_out=left_out, norm_limit=limit)


def _coded(values: pd.Series, names: dict[str, int]) -> Array:
    """Numbers of names, int32; a name that is new gets the next one, and -1 stands for none."""
    codes, found = pd.factorize(values)
    numbers = np.array([*(names.setdefault(str(n), len(names)) for n in found), -1], np.int32)
    return numbers[codes]


def _joined(parts: list[Array], names: dict[str, int] | None) -> Any:
    values = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    return values if names is None else pd.Categorical.from_codes(values, list(names))


def harvested(runs: Sequence[Run], hook_point: str, **how: Any) -> Harvested:
    """Read the rows of runs, all of them into memory. Arguments and errors as of `listed`."""
    return listed(runs, hook_point, **how).loaded()


def _out(families: pd.Series, share: float, seed: int) -> Array:
    """Which rows are of families that are held out, bool `[N]`."""
    names = sorted(families.unique())
    if len(names) < 2:
        raise ConfigError(
            f"nothing can be held out: all {len(families)} rows are of one family of requests",
            fix="name other runs in `evaluate_on`",
        )
    return families.isin(held_out_families(names, share, seed)).to_numpy()


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


def _by_hash(names: Iterable[str], seed: int) -> list[str]:
    return sorted(names, key=lambda n: hashlib.sha256(f"{seed} {n}".encode()).digest())


def _parts(rows: Array) -> Iterator[Array]:
    for start in range(0, len(rows), _READ):
        yield rows[start : start + _READ]
