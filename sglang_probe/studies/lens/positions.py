"""Which positions of a run a lens reads: drawn ones, those of one request, and the token that each should lead to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run
from sglang_probe.run.schema import OVERSHOOT
from sglang_probe.run.tokens import TokenFrames

Array = np.ndarray[Any, Any]


def next_tokens(tokens: pd.DataFrame, requests: pd.DataFrame) -> Array:
    """Id of the token after each position; -1 where it is not known."""
    found = np.full(len(tokens), -1, dtype=np.int64)
    position = tokens["position"].to_numpy()
    for rid, at in tokens.groupby("rid").indices.items():
        prompt, output = (requests.loc[rid, c] for c in ("prompt_ids", "output_ids"))
        if prompt is None or output is None:
            continue
        ids = np.concatenate([prompt, output]).astype(np.int64)
        inside = position[at] + 1 < len(ids)
        found[at[inside]] = ids[position[at[inside]] + 1]
    return found


def drawn_positions(
    run: Run, points: Mapping[int, str], frames: Callable[[], Iterable[pd.DataFrame]], most: int, seed: int
) -> pd.DataFrame:
    """Computed positions that every layer holds, at most so many.

    Args:
        frames: gives the positions to draw from, some at a time; asked twice.

    Raises:
        ConfigError: there is none.
    """
    counts = [len(_held(run, points, tokens, "row")) for tokens in frames()]
    total = sum(counts)
    if not total:
        raise ConfigError(f"{run.path} has no position whose row all of {', '.join(points.values())} hold")
    drawn = np.arange(total)
    if total > most:
        drawn = np.sort(np.random.default_rng(seed).choice(total, most, replace=False))
    parts, first = [], 0
    for tokens, count in zip(frames(), counts, strict=True):
        mine = drawn[(drawn >= first) & (drawn < first + count)] - first
        if len(mine):
            parts.append(_held(run, points, tokens, "row").iloc[mine])
        first += count
    return pd.concat(parts, ignore_index=True)


def _held(run: Run, points: Mapping[int, str], tokens: pd.DataFrame, column: str) -> pd.DataFrame:
    """Positions whose row every layer holds."""
    rows = tokens[column].to_numpy()
    return tokens[np.logical_and.reduce([run.holds(name, rows) for name in points.values()])]


def window_of(
    run: Run,
    points: Mapping[int, str],
    requests: pd.DataFrame,
    rid: str | None,
    start: int | None,
    window: int,
) -> pd.DataFrame:
    """Consecutive positions of one request whose rows every layer holds, its own or gathered ones.

    Args:
        requests: by rid.
        rid, start, window: as of `lens`.

    Raises:
        ConfigError: there is no such request, or it has no such positions.
    """
    if rid is not None and rid not in requests.index:
        raise ConfigError(f"{run.path} has no request `{rid}`", fix="`run.requests()` lists them")
    every = TokenFrames(run)

    def held(rid: str) -> pd.DataFrame:
        tokens = every.of([rid])
        tokens = tokens[(tokens["phase"] != OVERSHOOT) & tokens["intervention"].isna()]
        return _held(run, points, tokens, "source_row")

    if rid is None:
        rid = next((r for r in requests.index if len(held(r))), None)
    mine = held(rid) if rid is not None else every.of([])
    if start is None and len(mine):
        border = int(requests.loc[rid, "prompt_len"]) if requests.loc[rid, "prompt_len"] is not None else 0
        start = max(0, min(border - window // 2, int(mine["position"].max()) - window + 1))
    shown = mine[mine["position"] >= (start or 0)].head(window)
    if shown.empty:
        raise ConfigError(f"request `{rid}` of {run.path} has no rows of these layers from position {start} on")
    return shown
