"""One order of training for several harvests: batches are drawn of keys, and each harvest gives its row for a key.

A key is a request and a position. A harvest that lacks rows (the prefix cache left them out) would shift every later
batch if its rows were shuffled by themselves, and another order of the very same rows moves a dictionary about as far
as leaving out an eighth of the positions does. So all harvests share a schedule of keys: a row that two of them have is
in the same batch of both, and where a harvest has none it gives the row of a substitute, the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.sae.schedule import Schedule

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
KEY = ["rid", "position"]


@dataclass(frozen=True)
class Keyed:
    """The rows of one harvest by key."""

    x_ND: torch.Tensor
    at_K: Array
    """Place in `x_ND` of the row of each key, -1 where the harvest has none; int64."""

    @property
    def has(self) -> Array:
        """Which keys it has a row for, bool `[K]`."""
        return self.at_K >= 0

    def rows(self, keys: Array) -> torch.Tensor:
        """Rows of keys that it has, float32 `[n, D]`."""
        import torch

        return self.x_ND[torch.from_numpy(self.at_K[keys])].float()


def places(keys: pd.DataFrame, rows: pd.DataFrame) -> Array:
    """Place in `rows` of each key, -1 where there is none, int64 `[K]`.

    Args:
        keys, rows: columns `rid` and `position`.

    Raises:
        ConfigError: a key is there twice.
    """
    index = pd.MultiIndex.from_frame(rows[KEY])
    if not index.is_unique:
        raise ConfigError("a request has two rows of one position, so that they cannot be paired with those of others")
    return np.asarray(index.get_indexer(pd.MultiIndex.from_frame(keys[KEY])), np.int64)


@dataclass(frozen=True)
class KeySchedule:
    """Which keys, and which substitutes, each step asks for."""

    order: Schedule
    common: Array
    """Keys that every harvest has: what substitutes are drawn from."""
    seed: int

    @classmethod
    def of(cls, keys: int, harvests: Sequence[Keyed], seed: int) -> KeySchedule:
        """A schedule of so many keys.

        Raises:
            ConfigError: the harvests have no key in common.
        """
        common = np.logical_and.reduce([h.has for h in harvests])
        if not common.any():
            raise ConfigError("there is no position of which all harvests have a row")
        return cls(Schedule([np.arange(keys)], [1.0], seed), np.flatnonzero(common), seed)

    def batch(self, harvest: Keyed, step: int, size: int) -> torch.Tensor:
        """Rows of one step, float32 `[size, D]`."""
        keys = self.order.batch(step, size)
        drawn = np.random.default_rng([self.seed, step]).integers(0, len(self.common), size)
        return harvest.rows(np.where(harvest.has[keys], keys, self.common[drawn]))


def mixed(first: Keyed, second: Keyed, share: float) -> Keyed:
    """The first harvest with a share of its keys taken from the second: spread evenly over the keys, and those of a
    smaller share are among those of a larger one.

    Raises:
        ConfigError: the two have other keys, or the share is not between 0 and 1.
    """
    import torch

    if not 0 <= share <= 1 or not np.array_equal(first.has, second.has) or first.x_ND.dtype != second.x_ND.dtype:
        raise ConfigError("rows are mixed by shares from 0 to 1 of harvests that have the same keys")
    golden = (5**0.5 - 1) / 2  # multiples of it are spread evenly, any run of them too (Weyl 1916)
    taken = (np.arange(len(first.at_K)) * golden) % 1 < share
    at = np.where(taken & second.has, second.at_K + len(first.x_ND), first.at_K)
    return Keyed(torch.cat([first.x_ND, second.x_ND]), at)


def coverage(keys: pd.DataFrame, harvests: Mapping[str, Keyed], reference: Keyed) -> pd.DataFrame:
    """What each harvest has for the keys: by `harvest` and `segment`, `keys`, `rows` (keys with a row), `share`, and
    of these `identical` (rows equal to the reference's, to the bit)."""
    found = []
    for name, harvest in harvests.items():
        both = np.flatnonzero(harvest.has & reference.has)
        same = np.zeros(len(keys), dtype=bool)
        for part in np.array_split(both, max(1, len(both) // 65536)):
            same[part] = (harvest.rows(part) == reference.rows(part)).all(1).numpy()
        frame = pd.DataFrame({"segment": keys["segment"].astype(str), "has": harvest.has, "same": same})
        for segment, group in frame.groupby("segment", sort=True):
            has = int(group["has"].sum())
            identical = float(group["same"].sum() / has) if has else float("nan")
            found.append([name, segment, len(group), has, has / len(group), identical])
    return pd.DataFrame(found, columns=["harvest", "segment", "keys", "rows", "share", "identical"])
