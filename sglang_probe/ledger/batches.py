"""Rows for training and analysis: whole requests, and shuffled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from sglang_probe.errors import RunDirectoryError
from sglang_probe.ledger import schema

if TYPE_CHECKING:
    import torch

    from sglang_probe.ledger.run import Run


def activations(run: Run, rid: str, hook_point: str, *, missing: Literal["raise", "nan"]) -> torch.Tensor:
    """See `Run.activations`."""
    import torch

    tokens = run.tokens_of(rid)
    tokens = tokens[tokens["phase"] != schema.OVERSHOOT].sort_values("position")
    rows = tokens["source_row"].to_numpy()
    absent = tokens[rows < 0]
    if len(absent) and missing == "raise":
        first = absent.iloc[0]
        raise RunDirectoryError(
            f"{rid}: {len(absent)} of {len(tokens)} positions have no row, the first at position {first['position']} "
            f"({first['status']})",
            fix='flush the cache before recording, or pass missing="nan"',
        )
    have = rows >= 0
    values = run.rows(hook_point, rows[have])
    if have.all():
        return values
    out = torch.full((len(rows), values.shape[1]), float("nan"), dtype=values.dtype)
    out[torch.from_numpy(have)] = values
    return out


def iter_batches(
    run: Run,
    hook_point: str,
    *,
    batch_size: int,
    where: str | Callable[[pd.DataFrame], Any] | None,
    weight: Literal["unique", "traffic"],
    shuffle: bool,
    seed: int,
) -> Iterator[torch.Tensor]:
    """See `Run.iter_batches`."""
    tokens = run.tokens()
    tokens = tokens[tokens["phase"] != schema.OVERSHOOT]
    if where is not None:
        tokens = tokens.query(where) if isinstance(where, str) else tokens[where(tokens)]
    column = {"unique": "row", "traffic": "source_row"}.get(weight)
    if column is None:
        raise RunDirectoryError(f"unknown weight `{weight}`", fix="use `unique` or `traffic`")
    rows = tokens[column].to_numpy()
    rows = rows[rows >= 0]
    if shuffle:
        rows = np.random.default_rng(seed).permutation(rows)
    for i in range(0, len(rows), batch_size):
        yield run.rows(hook_point, rows[i : i + batch_size])
