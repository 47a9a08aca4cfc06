"""What is monitored of each trajectory: numbers per row, from recorded scores or from rows of a hook point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.harvested import harvested, refuse_mixed_models
from sglang_probe.sae.sae import SAE

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

LOG_NORM, ERROR_RATIO, L0 = "log norm", "error ratio", "L0"


@dataclass(frozen=True)
class Trajectories:
    """Numbers of the rows of requests."""

    names: tuple[str, ...]
    """What the columns of `values_NK` are."""
    values_NK: Array
    """float64; a number of a row may be missing (NaN)."""
    of_N: Array
    """Number of the trajectory of each row."""
    frame: pd.DataFrame
    """Of each trajectory, in the order in which their first rows were computed, run by run: `run` (number), `rid`,
    `family`, `rows`."""
    x_ND: torch.Tensor | None = None
    """The rows themselves, where a hook point was read."""

    def __len__(self) -> int:
        return len(self.frame)

    def only(self, which: Array) -> Trajectories:
        """Those trajectories that a mask names."""
        rows = np.flatnonzero(which[self.of_N])
        number = np.cumsum(which) - 1
        x = None if self.x_ND is None else self.x_ND[rows.tolist()]
        return Trajectories(
            self.names, self.values_NK[rows], number[self.of_N[rows]], self.frame[which].reset_index(drop=True), x
        )


def read(
    runs: Sequence[Run],
    *,
    hook_point: str | None = None,
    sae: SAE | None = None,
    features: Sequence[int] = (),
    where: str = "phase == 'decode'",
    rows: int | None = None,
) -> Trajectories:
    """Read the trajectories of runs.

    Args:
        hook_point: read its rows; None: the scores of probes that were recorded (`Run.scores`), a column each.
        sae: of that hook point: error and active latents of each row too.
        features: latents of it whose activations are columns.
        where: which positions: a pandas query over the columns of `Run.tokens`.
        rows: the first so many of each trajectory; shorter ones are left out. None: all.

    Raises:
        ConfigError: nothing is left, the query cannot be read, or the SAE has no such latent.
        RunDirectoryError: neither scores nor the hook point were recorded, or the query cannot be used.
    """
    refuse_mixed_models(runs)
    if hook_point is None:
        tokens, names, values, x = _scores(runs, where)
    else:
        # No row is left out for its norm: rows that have grown are what a monitor is for.
        held = harvested(runs, hook_point, where=where, sinks=Sinks(1, None))
        tokens, x = held.tokens, held.x_ND
        names, values = _numbers(x, sae, features)
    ranked = _order(runs, tokens).reset_index().sort_values(["run", "order", "rid"], kind="stable")
    keys = pd.MultiIndex.from_frame(ranked[["run", "rid"]])
    of = keys.get_indexer(pd.MultiIndex.from_frame(tokens[["run", "rid"]]))
    counts = np.bincount(of, minlength=len(keys))
    families = tokens.groupby(["run", "rid"])["family"].first().reindex(keys)
    frame = pd.DataFrame(
        {"run": ranked["run"].to_numpy(), "rid": ranked["rid"].to_numpy(), "family": families.to_numpy()}
    ).assign(rows=counts)
    found = Trajectories(names, values, of, frame, x)
    if rows is None:
        return found
    place = pd.Series(of).groupby(of).cumcount().to_numpy()
    keep = place < rows
    cut = Trajectories(
        names, values[keep], of[keep], frame.assign(rows=np.minimum(counts, rows)), None if x is None else x[keep]
    )
    cut = cut.only(counts >= rows)
    if not len(cut):
        raise ConfigError(f"no trajectory has {rows} rows", fix=f"the longest has {counts.max()}")
    return cut


def _scores(runs: Sequence[Run], where: str) -> tuple[pd.DataFrame, tuple[str, ...], Array, None]:
    frames: list[pd.DataFrame] = []
    columns: list[str] = []
    for number, run in enumerate(runs):
        scores = run.scores()
        mine = [c for c in scores.columns if c not in _NO_SCORES]
        if columns and mine != columns:
            raise ConfigError(f"{run.path} has scores of {mine}, and {runs[0].path} of {columns}")
        columns = mine
        try:
            scores = scores.query(where)
        except Exception as e:  # pandas raises many kinds
            raise ConfigError(f"`{where}` cannot be used to choose positions: {e}") from e
        families = run.requests().set_index("rid")["family"]
        family = scores["rid"].map(families)
        frames.append(scores.assign(run=number, family=family.fillna(scores["rid"])))
    tokens = pd.concat(frames, ignore_index=True)
    if not len(tokens):
        raise ConfigError(f"the runs have no scores of positions with `{where}`")
    return tokens, tuple(columns), tokens[columns].to_numpy(np.float64), None


_NO_SCORES = {"rid", "position", "token_id", "segment", "status", "phase", "forward_id", "intervention"}


def _order(runs: Sequence[Run], tokens: pd.DataFrame) -> pd.Series:
    """The first forward pass of each request, by `run` and `rid`. Not the last one: in order of their ends short
    trajectories would come first."""
    parts = []
    for number in sorted(tokens["run"].unique()):
        spans = runs[number].spans()
        spans = spans[spans["status"] == schema.COMPUTED]
        parts.append(spans.groupby("rid")["forward_id"].min().rename("order").reset_index().assign(run=number))
    found = pd.concat(parts).set_index(["run", "rid"])["order"]
    here = pd.MultiIndex.from_frame(tokens[["run", "rid"]].drop_duplicates())
    return found.reindex(here).fillna(0)


def _numbers(x_ND: torch.Tensor, sae: SAE | None, features: Sequence[int]) -> tuple[tuple[str, ...], Array]:
    import torch

    names = [LOG_NORM, *([ERROR_RATIO, L0] if sae is not None else []), *(f"feature {i}" for i in features)]
    if features and sae is None:
        raise ConfigError("`--feature` needs `--sae`: whose features they are")
    if sae is not None and (beyond := [i for i in features if not 0 <= i < sae.latents]):
        raise ConfigError(f"there is no latent {beyond[0]}: the SAE has {sae.latents}, numbered from 0")
    parts = []
    for part in x_ND.split(4096):  # type: ignore[no-untyped-call]
        rows = part.float()
        norm2 = rows.square().sum(1).clamp_min(1e-30)
        columns = [norm2.log() / 2]
        if sae is not None:
            z, made = sae.encode_and_reconstruct(rows)
            error = (rows - made).square().sum(1)
            columns += [error / norm2, (z > 0).sum(1).float(), *(z[:, i] for i in features)]
        parts.append(torch.stack(columns, dim=1))
    return tuple(names), torch.cat(parts).numpy().astype(np.float64)
