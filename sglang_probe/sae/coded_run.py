"""Sparse codes of runs: which latents fire at which positions of which texts.

Every distinct row is encoded once, however often its position was reused; where a text reused it, the code is known too
and is marked as gathered. Codes are sparse matrices: a row has some tens of thousands of latents that do not fire.
Runs are read one after another and are forgotten when they are encoded: what is held grows with `most`, not with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.run.batches import in_parts, queried
from sglang_probe.run.run import Run
from sglang_probe.run.schema import OVERSHOOT
from sglang_probe.run.tokens import TokenFrames
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.sae import SAE

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
_BLOCK_NUMBERS = 2**23
"""Dense activations at a time: 32 MiB."""
_COLUMNS = ["run", "rid", "position", "token_id", "segment", "phase", "row"]


@dataclass(frozen=True)
class Coded:
    """N rows of runs and their codes."""

    rows: pd.DataFrame
    """A row each: `run` (its name), `rid`, `position`, `token_id`, `segment`, `phase`, `row` (its number in the run),
    `family`, `flat` (place in `ids`), `reused` (how many further positions were served from it)."""
    codes: Any
    """Activations, scipy CSR `[N, M]`, float32."""
    norms: Array
    """Of the rows, `[N]`."""
    ids: Array
    """Token ids of the texts that were read, laid end to end, int64 `[T]`."""
    text: Array
    """Number of the text of each of these positions, `[T]`."""
    texts: pd.DataFrame
    """The texts: `run`, `rid`, `family`."""
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

    @property
    def runs(self) -> list[str]:
        """Names of the runs that texts come from."""
        return list(dict.fromkeys(self.texts["run"]))

    @property
    def text_of_row(self) -> Array:
        """Number of the text of each row, `[N]`."""
        return np.asarray(self.text[self.rows["flat"].to_numpy()])

    def window(self, flat: int, before: int, after: int) -> tuple[int, int]:
        """First place and end, in `ids`, of a window within the text of a place."""
        text = self.text[flat]
        start, end = max(flat - before, 0), min(flat + after + 1, len(self.ids))
        inside = np.flatnonzero(self.text[start:end] == text)
        return start + int(inside[0]), start + int(inside[-1]) + 1


def run_names(paths: Sequence[Path]) -> list[str]:
    """Names that tell runs apart: the last parts of their paths, as few as will do.

    Raises:
        ConfigError: a run is named twice.
    """
    whole = [p.resolve() for p in paths]
    if twice := next((p for p in whole if whole.count(p) > 1), None):
        raise ConfigError(f"{twice} is named twice", fix="name each run once")
    for parts in range(1, max((len(p.parts) for p in whole), default=1)):
        names = ["/".join(p.parts[-parts:]) for p in whole]
        if len(set(names)) == len(names):
            return names
    return [str(p) for p in whole]


def code_run(run: Run, sae: SAE, **how: Any) -> Coded:
    """`code_runs` of one."""
    return code_runs([run], sae, **how)


def code_runs(
    runs: Sequence[Run],
    sae: SAE,
    *,
    where: str | None = None,
    sinks: Sinks | None = None,
    most: int = 200_000,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Coded:
    """Encode the rows of runs. Whole texts are drawn, from all runs alike, until they have `most` rows.

    Args:
        where: which rows, a pandas query over the columns of `run.tokens()`.
        sinks: rows left out; default: position 0, and norms of 10 times the median.
        tell: is told how many of about how many rows were encoded.

    Raises:
        ConfigError: no row is left, the SAE does not say of what, or token ids are not known.
        RunDirectoryError: a run lacks the hook point.
    """
    from scipy import sparse

    point = sae.hook_point
    if point is None:
        raise ConfigError("the SAE does not say where its rows come from", fix="give the hook point")
    names = run_names([run.path for run in runs])
    drawn, expected = _drawn(runs, point, most, seed)
    parts: list[_Part] = []
    for run, name, rids in zip(runs, names, drawn, strict=True):
        if len(rids):
            done = sum(len(p.rows) for p in parts)
            told = partial(_further, tell, done, expected)
            parts.append(_part(run, name, len(runs) == 1, point, sae, rids, where, told))
    if not sum(len(p.rows) for p in parts):
        said = runs[0].path if len(runs) == 1 else f"{len(runs)} runs: none of them"
        raise ConfigError(f"{said} has rows of `{point}` that fit", fix="see `where` and the sampling of rows")
    places = np.cumsum([0, *(len(p.ids) for p in parts)])
    texts = np.cumsum([0, *(len(p.texts) for p in parts)])
    rows = pd.concat([p.rows.assign(flat=p.rows["flat"] + at) for p, at in zip(parts, places, strict=False)])
    codes, norm = sparse.vstack([p.codes for p in parts], format="csr"), np.concatenate([p.norms for p in parts])
    sinks = sinks or Sinks()
    first = rows["position"].to_numpy() < sinks.first_positions
    sink, _ = sinks.of(rows["position"].to_numpy(), norm)
    if sink.all():
        raise ConfigError(f"all {len(rows)} rows of `{point}` are attention sinks")
    # Number of a row among those that are left; -1 of a sink, and of a place without one.
    number = np.append(np.where(sink, -1, np.cumsum(~sink) - 1), -1)
    shifted = zip(parts, np.cumsum([0, *(len(p.rows) for p in parts)]), strict=False)
    row_of = number[np.concatenate([np.where(p.row_of < 0, -1, p.row_of + at) for p, at in shifted])]
    gathered = np.concatenate([p.gathered for p in parts]) & (row_of >= 0)
    named = pd.concat([p.texts for p in parts], ignore_index=True)
    kept = rows[~sink].reset_index(drop=True)[[*_COLUMNS, "family", "flat", "reused"]]
    return Coded(
        kept,
        codes[~sink],
        norm[~sink],
        np.concatenate([p.ids for p in parts]),
        np.concatenate([p.text + at for p, at in zip(parts, texts, strict=False)]),
        named,
        np.concatenate([p.position for p in parts]),
        row_of,
        gathered,
        {"first position": int(first.sum()), "norm": int((sink & ~first).sum())},
    )


def _further(tell: Callable[[int, int], None], before: int, expected: int, done: int) -> None:
    tell(before + done, expected)


@dataclass(frozen=True)
class _Part:
    """As `Coded` of one run, places and numbers counted from 0, sinks still there."""

    rows: pd.DataFrame
    codes: Any
    norms: Array
    ids: Array
    text: Array
    texts: pd.DataFrame
    position: Array
    row_of: Array
    gathered: Array


def _part(
    run: Run,
    name: str,
    alone: bool,
    point: str,
    sae: SAE,
    rids: pd.Index,
    where: str | None,
    tell: Callable[[int], None],
) -> _Part:
    from scipy import sparse

    tokens = TokenFrames(run).of(rids)
    tokens = tokens[(tokens["phase"] != OVERSHOOT) & tokens["intervention"].isna()]
    requests = run.requests().set_index("rid").loc[rids]
    lists = [np.concatenate([p, o]) for p, o in zip(requests["prompt_ids"], requests["output_ids"], strict=True)]
    lengths = np.array([len(x) for x in lists])
    ids, text = np.concatenate(lists).astype(np.int64), np.repeat(np.arange(len(lists)), lengths)
    starts = np.cumsum(lengths) - lengths
    position = np.arange(len(ids)) - np.repeat(starts, lengths)
    # A request without a family is one by itself. Requests of other runs have the same names.
    own_name = list(rids) if alone else [f"{name}: {rid}" for rid in rids]
    family = requests["family"].where(requests["family"].notna(), own_name)
    tokens = tokens[run.holds(point, tokens["source_row"].to_numpy())]
    place = pd.Series(starts, index=rids)
    tokens = tokens.assign(flat=place.loc[tokens["rid"]].to_numpy() + tokens["position"].to_numpy())
    source = tokens["source_row"].to_numpy()
    own = (tokens["row"].to_numpy() == source) & (source >= 0)
    times = pd.Series(source).value_counts()
    rows = queried(tokens[own], where)
    rows = rows.assign(
        run=name,
        family=family.loc[rows["rid"]].to_numpy(),
        reused=times.loc[rows["source_row"]].to_numpy() - 1,
    )
    block = max(1, min(2048, _BLOCK_NUMBERS // sae.W_dec.shape[0]))
    blocks, norms = [sparse.csr_array((0, sae.W_dec.shape[0]), dtype=np.float32)], [np.empty(0, np.float32)]
    for at in range(0, len(rows), block):
        x = run.rows(point, rows["row"].to_numpy()[at : at + block]).float()
        norms.append(x.norm(dim=1).numpy())  # type: ignore[no-untyped-call]
        blocks.append(sparse.csr_array(_encode(sae, x)))
        tell(min(at + block, len(rows)))
    row_of = np.full(len(ids), -1, dtype=np.int64)
    number = pd.Series(np.arange(len(rows)), index=rows["source_row"].to_numpy())
    found = number.reindex(source).fillna(-1).to_numpy(np.int64)
    row_of[tokens["flat"].to_numpy()] = found
    gathered = np.zeros(len(ids), dtype=bool)
    gathered[tokens["flat"].to_numpy()] = ~own & (found >= 0)
    texts = pd.DataFrame({"run": name, "rid": list(rids), "family": family.to_numpy()})
    codes = sparse.vstack(blocks, format="csr")
    return _Part(rows, codes, np.concatenate(norms), ids, text, texts, position, row_of, gathered)


def _encode(sae: SAE, x: torch.Tensor) -> Array:
    import torch

    with torch.inference_mode():
        return sae.encode(x).float().numpy()


def _drawn(runs: Sequence[Run], point: str, most: int, seed: int) -> tuple[list[pd.Index], int]:
    """Requests drawn of each run, in the order in which it has them, and about how many rows they have."""
    found = []
    for run in runs:
        requests = run.requests()
        known = requests["prompt_ids"].notna() & requests["output_ids"].notna()
        if not known.any():
            raise ConfigError(f"{run.path} has no token ids", fix="record with privacy level `ids`")
        rids = pd.Index(requests.loc[known, "rid"])
        held = (t.loc[run.holds(point, t["row"].to_numpy()), "rid"] for t in in_parts(run, None))
        sizes = pd.concat([pd.Series(dtype="int64"), *(rid.value_counts(sort=False) for rid in held)])
        found.append(sizes.reindex(rids).fillna(0))
    of = np.repeat(np.arange(len(runs)), [len(f) for f in found])
    counts = np.concatenate([f.to_numpy() for f in found])
    order = np.random.default_rng(seed).permutation(len(counts))
    total = counts[order].cumsum()
    chosen = np.sort(order[: max(int((total < most).sum()) + 1, 1)])
    starts = np.cumsum([0, *(len(f) for f in found)])
    drawn = [f.index[chosen[of[chosen] == i] - starts[i]] for i, f in enumerate(found)]
    return drawn, int(counts[chosen].sum())
