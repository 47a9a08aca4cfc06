"""Rows for training and analysis: whole requests, and shuffled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError, ProbeError, RunDirectoryError
from sglang_probe.run import schema, weighting
from sglang_probe.run import tokens as positions
from sglang_probe.run.files import RunFiles

if TYPE_CHECKING:
    import torch


_PART = 1 << 14
"""Positions of a part."""


def activations(
    run: RunFiles,
    tokens: pd.DataFrame,
    hook_point: str,
    *,
    missing: Literal["raise", "nan"],
    first: int = 0,
    intervened: bool = False,
) -> torch.Tensor:
    """See `Run.activations`: `[positions, width]`.

    Args:
        tokens: `run.tokens_of` the request.

    Raises:
        RunDirectoryError: with `missing="raise"`, a position has no row.
    """
    import torch

    rid = tokens["rid"].iloc[0]
    tokens = tokens[(tokens["phase"] != schema.OVERSHOOT) & (tokens["position"] >= first)].sort_values("position")
    rows = tokens["source_row"].to_numpy()
    have = run.holds(hook_point, rows)
    if not intervened:
        have &= tokens["intervention"].isna().to_numpy()
    absent = tokens[~have]
    if len(absent) and missing == "raise":
        raise RunDirectoryError(
            f"{rid}: {len(absent)} of {len(tokens)} positions have no row of `{hook_point}`: {why_absent(absent)}",
            fix='pass missing="nan", or `intervened=True` for rows under interventions; a server begins a segment '
            "that reuses nothing older with `POST /probe/flush?cache=true`",
        )
    values = run.rows(hook_point, rows[have])
    if have.all():
        return values
    out = torch.full((len(rows), values.shape[1]), float("nan"), dtype=values.dtype)
    out[torch.from_numpy(have)] = values
    return out


def why_absent(absent: pd.DataFrame) -> str:
    """What became of positions without a row, in words: how many, and where the first is."""
    elsewhere = (absent["status"] == schema.REUSED) & ~absent["covered"]
    kinds = np.where(elsewhere, "reused from entries whose forward pass is not in this run", absent["status"])
    kinds = np.where(absent["source_row"] >= 0, "not selected (`rows` of the configuration)", kinds)
    kinds = np.where(absent["intervention"].notna(), "computed under an intervention", kinds)
    first = absent.groupby(kinds, sort=False)["position"].agg(["size", "min"])
    return "; ".join(f"{n} {kind} (from position {start})" for kind, n, start in first.itertuples(name=None))


def iter_batches(
    run: RunFiles,
    hook_point: str,
    *,
    batch_size: int,
    where: str | Callable[[pd.DataFrame], Any] | None,
    weight: str | Path | pd.DataFrame,
    shuffle: bool,
    seed: int,
    intervened: bool = False,
) -> Iterator[torch.Tensor]:
    """See `Run.iter_batches`: up to `batch_size` rows each, `[n, width]`.

    Raises:
        RunDirectoryError: the hook point was not captured, or `where`, the weights or `batch_size` cannot be used.
    """
    if batch_size < 1:
        raise RunDirectoryError(f"`batch_size` is {batch_size}", fix="give the rows of a batch, 1 or more")
    rng = np.random.default_rng(seed)
    rows = chosen(run, hook_point, where=where, weight=weight, rng=rng, intervened=intervened)["row"]
    rows = rows.to_numpy(copy=True)
    if shuffle:
        rows = rng.permutation(rows)
    for i in range(0, len(rows), batch_size):
        yield run.rows(hook_point, rows[i : i + batch_size])


def chosen(
    run: RunFiles,
    hook_point: str,
    *,
    where: str | Callable[[pd.DataFrame], Any] | None,
    weight: str | Path | pd.DataFrame,
    rng: np.random.Generator,
    intervened: bool = False,
) -> pd.DataFrame:
    """The positions whose rows an epoch of `iter_batches` gives, in the run's order and as often as it gives them: the
    columns of `Run.tokens()`, `row` being the number of the row that is read. Positions under an intervention are left
    out unless `intervened`.

    Raises:
        RunDirectoryError: `where` or the weights cannot be used.
    """
    tokens = positions.read_tokens(run, interrupted=False)
    tokens = tokens[(tokens["phase"] != schema.OVERSHOOT) & (intervened | tokens["intervention"].isna())]
    if isinstance(where, str):
        tokens = queried(tokens, where, error=RunDirectoryError)
    elif where is not None:
        tokens = tokens[where(tokens)]
    if isinstance(weight, str) and weight in ("unique", "traffic"):
        rows = tokens[{"unique": "row", "traffic": "source_row"}[weight]]
        return tokens.assign(row=rows)[run.holds(hook_point, rows.to_numpy())]
    tokens = tokens[run.holds(hook_point, tokens["row"].to_numpy())]
    times = weighting.copies(weighting.weights_of(tokens, weight), rng)
    return tokens.iloc[np.repeat(np.arange(len(tokens)), times)]


def chosen_in_parts(
    run: RunFiles, hook_point: str, *, where: str | None, weight: str | Path, rng: np.random.Generator
) -> Iterator[pd.DataFrame]:
    """What `chosen` gives, in its order, some requests at a time where that is the same: a query may compare a position
    with all others, and the weights of a file are relative to their sum.

    Raises:
        RunDirectoryError: as `chosen`.
    """
    if where is not None or weight not in ("unique", "traffic"):
        yield chosen(run, hook_point, where=where, weight=weight, rng=rng)
        return
    for tokens in positions.iter_tokens(run, _PART):
        tokens = tokens[(tokens["phase"] != schema.OVERSHOOT) & tokens["intervention"].isna()]
        rows = tokens[{"unique": "row", "traffic": "source_row"}[str(weight)]]
        yield tokens.assign(row=rows)[run.holds(hook_point, rows.to_numpy())]


def queried(
    tokens: pd.DataFrame, where: str | None, *, name: str = "where", error: type[ProbeError] = ConfigError
) -> pd.DataFrame:
    """The positions that a pandas query chooses; all of them without one.

    Args:
        name: of the key or option, for the message.
        error: what is raised if it cannot be used.
    """
    if where is None:
        return tokens
    try:
        return tokens.query(where)
    except Exception as e:  # pandas raises a kind of its own for each mistake
        columns = ", ".join(map(str, tokens.columns))
        raise error(f"`{name}` cannot be used: {e}", fix=f"the columns are {columns}") from e
