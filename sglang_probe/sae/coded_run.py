"""Sparse codes of a run: which latents fire at which positions of which texts.

Every distinct row is encoded once, however often its position was reused; where a text reused it, the code is known too
and is marked as gathered. Codes are sparse matrices: a row has some tens of thousands of latents that do not fire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.run.batches import queried
from sglang_probe.run.run import Run
from sglang_probe.run.schema import OVERSHOOT
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.sae import SAE

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
_BLOCK = 2048
_COLUMNS = ["rid", "position", "token_id", "segment", "phase", "row"]


@dataclass(frozen=True)
class Coded:
    """N rows of a run and their codes."""

    rows: pd.DataFrame
    """A row each: `rid`, `position`, `token_id`, `segment`, `phase`, `row` (its number in the run), `family`, `flat`
    (place in `ids`), `reused` (how
    many further positions were served from it)."""
    codes: Any
    """Activations, scipy CSR `[N, M]`, float32."""
    norms: Array
    """Of the rows, `[N]`."""
    ids: Array
    """Token ids of the texts that were read, laid end to end, int64 `[T]`."""
    text: Array
    """Number of the text of each of these positions, `[T]`."""
    rids: list[str]
    """The texts."""
    position: Array
    """Position in its text, `[T]`."""
    row_of: Array
    """Row that holds each of these positions, its own or the one it was gathered from; -1: none, `[T]`."""
    gathered: Array
    """Whether that is another request's, bool `[T]`."""
    left_out: dict[str, int]
    """Rows left out by reason."""

    def __len__(self) -> int:
        return len(self.rows)

    def window(self, flat: int, before: int, after: int) -> tuple[int, int]:
        """First place and end, in `ids`, of a window within the text of a place."""
        text = self.text[flat]
        start, end = max(flat - before, 0), min(flat + after + 1, len(self.ids))
        inside = np.flatnonzero(self.text[start:end] == text)
        return start + int(inside[0]), start + int(inside[-1]) + 1


def code_run(
    run: Run,
    sae: SAE,
    *,
    where: str | None = None,
    sinks: Sinks | None = None,
    most: int = 200_000,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Coded:
    """Encode the rows of a run. Whole texts are drawn until they have `most` rows.

    Args:
        where: which rows, a pandas query over the columns of `run.tokens()`.
        sinks: rows left out; default: position 0, and norms of 10 times the median.
        tell: is told how many of how many rows were encoded.

    Raises:
        ConfigError: no row is left, the SAE does not say of what, or token ids are not known.
        RunDirectoryError: the run lacks the hook point.
    """
    from scipy import sparse

    point = sae.hook_point
    if point is None:
        raise ConfigError("the SAE does not say where its rows come from", fix="give the hook point")
    tokens, ids, text, rids, position = _texts(run, point, most, seed)
    held = run.holds(point, tokens["source_row"].to_numpy())
    tokens = tokens[held]
    offset = np.searchsorted(text, np.arange(len(rids)))
    place = pd.Series(offset, index=rids)
    tokens = tokens.assign(flat=place.loc[tokens["rid"]].to_numpy() + tokens["position"].to_numpy())
    source = tokens["source_row"].to_numpy()
    own = (tokens["row"].to_numpy() == source) & (source >= 0)
    times = pd.Series(source).value_counts()
    rows = tokens[own]
    rows = queried(rows, where)
    if rows.empty:
        raise ConfigError(f"{run.path} has no rows of `{point}` that fit", fix="see `where` and the sampling of rows")
    families = run.requests().set_index("rid")["family"]
    family = rows["rid"].map(families)
    rows = rows.assign(
        family=family.fillna(rows["rid"]).to_numpy(), reused=times.loc[rows["source_row"]].to_numpy() - 1
    )
    blocks, norms = [], []
    for at in range(0, len(rows), _BLOCK):
        x = run.rows(point, rows["row"].to_numpy()[at : at + _BLOCK]).float()
        norms.append(x.norm(dim=1).numpy())  # type: ignore[no-untyped-call]
        blocks.append(sparse.csr_array(_encode(sae, x)))
        tell(min(at + _BLOCK, len(rows)), len(rows))
    codes, norm = sparse.vstack(blocks, format="csr"), np.concatenate(norms)
    sinks = sinks or Sinks()
    first = rows["position"].to_numpy() < sinks.first_positions
    sink, _ = sinks.of(rows["position"].to_numpy(), norm)
    if sink.all():
        raise ConfigError(f"all {len(rows)} rows of `{point}` are attention sinks")
    rows = rows[~sink].reset_index(drop=True)
    row_of = np.full(len(ids), -1, dtype=np.int64)
    number = pd.Series(np.arange(len(rows)), index=rows["source_row"].to_numpy())
    found = number.reindex(source).fillna(-1).to_numpy(np.int64)
    row_of[tokens["flat"].to_numpy()] = found
    gathered = np.zeros(len(ids), dtype=bool)
    gathered[tokens["flat"].to_numpy()] = ~own & (found >= 0)
    left_out = {"first position": int(first.sum()), "norm": int((sink & ~first).sum())}
    kept = rows[[*_COLUMNS, "family", "flat", "reused"]]
    return Coded(kept, codes[~sink], norm[~sink], ids, text, rids, position, row_of, gathered, left_out)


def _encode(sae: SAE, x: torch.Tensor) -> Array:
    import torch

    with torch.inference_mode():
        return sae.encode(x).float().numpy()


def _texts(run: Run, point: str, most: int, seed: int) -> tuple[pd.DataFrame, Array, Array, list[str], Array]:
    """Positions of drawn requests with an entry, and the texts: ids, number of the text, names, position."""
    tokens = run.tokens()
    tokens = tokens[(tokens["phase"] != OVERSHOOT) & tokens["intervention"].isna()]
    requests = run.requests()
    known = requests["prompt_ids"].notna() & requests["output_ids"].notna()
    if not known.any():
        raise ConfigError(f"{run.path} has no token ids", fix="record with privacy level `ids`")
    requests = requests[known].set_index("rid")
    counts = tokens[run.holds(point, tokens["row"].to_numpy())].groupby("rid").size()
    order = np.random.default_rng(seed).permutation(len(requests))
    total = counts.reindex(requests.index[order]).fillna(0).cumsum()
    drawn = max(int((total < most).sum()) + 1, 1)
    chosen = requests.iloc[np.sort(order[:drawn])]
    lists = [np.concatenate([p, o]) for p, o in zip(chosen["prompt_ids"], chosen["output_ids"], strict=True)]
    lengths = np.array([len(x) for x in lists])
    ids = np.concatenate(lists).astype(np.int64)
    text = np.repeat(np.arange(len(lists)), lengths)
    position = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return tokens[tokens["rid"].isin(chosen.index)], ids, text, list(chosen.index), position
