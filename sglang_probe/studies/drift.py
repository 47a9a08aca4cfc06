"""Drift: how far the rows of two runs differ at positions that both computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ProbeError
from sglang_probe.run.run import Run
from sglang_probe.run.tokens import TokenFrames
from sglang_probe.stats.distance import row_distance

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Compared:
    """Positions that both runs computed with a captured row, and the distance of their rows per hook point.

    `positions` has columns index (request), position, segment, phase and cluster (prefix family of the request, or
    itself), the last three as categories: 16 bytes a position at most. The float32 arrays align with it.
    """

    positions: pd.DataFrame
    relative_l2: dict[str, np.ndarray[Any, Any]]
    cosine: dict[str, np.ndarray[Any, Any]]
    deviation: dict[str, np.ndarray[Any, Any]]
    """Largest absolute difference of two entries of a row."""

    def at(self, mask: np.ndarray[Any, Any]) -> Compared:
        """Some of the positions."""
        measures = ({k: v[mask] for k, v in m.items()} for m in (self.relative_l2, self.cosine, self.deviation))
        return Compared(self.positions[mask].reset_index(drop=True), *measures)


def compare_runs(
    a: Run,
    b: Run,
    *,
    until: pd.Series | None = None,
    prepare: Callable[[pd.DataFrame], pd.DataFrame] = lambda tokens: tokens,
) -> Compared:
    """Compare two runs of the same requests, `b` being the reference, some requests at a time.

    Args:
        until: per request (by index) the first position whose tokens differ; positions from there on are left out. None
            if the outputs are the same.
        prepare: made of each frame of tokens before rows are taken from its column `row`.

    Raises:
        ProbeError: a position holds different tokens in the two runs.
    """
    others = TokenFrames(b)
    requests = b.requests_table(["rid", "index"]).to_pandas().set_index("index")["rid"]
    index_a, index_b = (run.requests_table(["rid", "index"]).to_pandas().set_index("rid")["index"] for run in (a, b))
    pieces: dict[str, list[Array]] = {name: [] for name in ("index", "position", "segment", "phase")}
    names: dict[str, dict[str, int]] = {"segment": {}, "phase": {}}
    measures: list[dict[str, list[Array]]] = [{h: [] for h in a.hook_points} for _ in range(3)]
    for tokens in a.iter_tokens():
        mine = _rows_of(prepare(tokens), index_a)
        if mine.empty:
            continue
        theirs = others.of(requests.reindex(mine["index"].unique()).dropna())
        joined = _joined(a, b, mine, _rows_of(prepare(theirs), index_b), until)
        for name, parts in pieces.items():
            values = joined[name if name in ("index", "position") else f"{name}_a"]
            parts.append(_coded(values, names[name]) if name in names else values.to_numpy(np.int32))
        for hook_point in a.hook_points:
            for measure, values in zip(measures, _distances(a, b, hook_point, joined), strict=True):
                measure[hook_point].append(values)
    positions = pd.DataFrame(
        {
            n: pd.Categorical.from_codes(_concatenated(pieces.pop(n), np.int16), list(names[n]))
            if n in names
            else _concatenated(pieces.pop(n), np.int32)
            for n in list(pieces)
        }
    ).assign(cluster=lambda p: _clusters(b, p["index"]))
    return Compared(positions, *({h: _concatenated(m.pop(h), np.float32) for h in list(m)} for m in measures))


def _joined(a: Run, b: Run, mine: pd.DataFrame, theirs: pd.DataFrame, until: pd.Series | None) -> pd.DataFrame:
    """Positions that both computed in the same phase.

    Raises:
        ProbeError: a position holds different tokens in the two runs.
    """
    joined = mine.merge(theirs, on=["index", "position"], suffixes=("_a", "_b"))
    if until is not None and len(joined):
        joined = joined[joined["position"] < joined["index"].map(until)]
    wrong = joined[joined["token_id_a"] != joined["token_id_b"]]
    if len(wrong):
        w = wrong.iloc[0]
        raise ProbeError(
            f"{a.path} and {b.path} hold different tokens at request {w['index']}, position {w['position']}; "
            "their rows cannot be compared"
        )
    return joined[joined["phase_a"] == joined["phase_b"]]


def _distances(a: Run, b: Run, hook_point: str, joined: pd.DataFrame) -> list[Array]:
    """Relative L2, cosine and largest deviation of each position's rows, float32.

    Raises:
        ProbeError: one of the runs does not hold all of them.
    """
    row_a, row_b = joined["row_a"].to_numpy(), joined["row_b"].to_numpy()
    if not (a.holds(hook_point, row_a) & b.holds(hook_point, row_b)).all():
        raise ProbeError(
            f"`{hook_point}` was not captured at all positions, and studies of pairs compare all of them",
            fix="record without `rows`",
        )
    if not len(joined):
        return [np.empty(0, np.float32)] * 3
    return [x.astype(np.float32) for x in row_distance(a.rows(hook_point, row_a), b.rows(hook_point, row_b))]


def _clusters(run: Run, index: pd.Series) -> pd.Categorical:
    """Prefix family of the request of each position, or the request itself."""
    requests = run.requests_table(["index", "rid", "family"]).to_pandas().set_index("index")
    family = requests["family"].where(requests["family"].notna(), requests["rid"])
    codes, which = pd.factorize(index)
    named = pd.Categorical(pd.Index(which).map(family))
    return pd.Categorical.from_codes(named.codes[codes], dtype=named.dtype)


def _coded(values: pd.Series, names: dict[str, int]) -> Array:
    """Numbers of names, int16; a name that is new gets the next one."""
    codes, found = pd.factorize(values)
    return np.array([names.setdefault(str(n), len(names)) for n in found], np.int16)[codes]


def _concatenated(parts: list[Array], dtype: Any) -> Array:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def in_common(compared: Sequence[Compared]) -> list[Compared]:
    """The comparisons, over the positions that all of them have: means over other positions are not comparable."""
    if not compared:
        return []
    phases: dict[str, int] = {}
    keys = [_key(c.positions, phases) for c in compared]
    common = np.unique(keys[0])
    for key in keys[1:]:
        common = common[np.isin(common, key)]
    return [c.at(np.isin(key, common)) for c, key in zip(compared, keys, strict=True)]


def _key(positions: pd.DataFrame, phases: dict[str, int]) -> Array:
    """One number for request, phase and position."""
    phase = _coded(positions["phase"], phases).astype(np.int64)
    return (positions["index"].to_numpy(np.int64) << 3 | phase) << 32 | positions["position"].to_numpy(np.int64)


def first_divergence(a: Run, b: Run) -> pd.Series:
    """Per request (by index) the first position at which the output tokens of two runs differ; the end of the shorter
    where they agree."""
    left, right = (run.requests().set_index("index") for run in (a, b))
    common = left.index.intersection(right.index)
    ends = []
    for index in common:
        x, y = (np.asarray(side.at[index, "output_ids"]) for side in (left, right))
        n = min(len(x), len(y))
        differ = np.flatnonzero(x[:n] != y[:n])
        ends.append(int(left.at[index, "prompt_len"]) + (int(differ[0]) if len(differ) else n))
    return pd.Series(ends, index=common)


def drift_table(compared: Compared) -> pd.DataFrame:
    """Per hook point and phase: positions, share bit-identical, relative L2 (median, p99, max), lowest cosine, and the
    largest absolute difference."""
    rows = []
    for hook_point, l2 in compared.relative_l2.items():
        for phase, at in compared.positions.groupby("phase", sort=False).indices.items():
            values = l2[at]
            rows.append(
                {
                    "hook_point": hook_point,
                    "phase": phase,
                    "positions": len(at),
                    "identical": float((values == 0).mean()),
                    "l2_median": float(np.median(values)),
                    "l2_p99": float(np.quantile(values, 0.99)),
                    "l2_max": float(values.max()),
                    "cosine_min": float(compared.cosine[hook_point][at].min()),
                    "deviation_max": float(compared.deviation[hook_point][at].max()),
                }
            )
    columns = ["hook_point", "phase", "positions", "identical", "l2_median", "l2_p99", "l2_max", "cosine_min"]
    columns.append("deviation_max")
    return pd.DataFrame(rows, columns=columns)


def _rows_of(tokens: pd.DataFrame, index: pd.Series) -> pd.DataFrame:
    """Positions with a captured row: index, position, token_id, segment, phase, row."""
    kept = tokens[(tokens["row"] >= 0) & (tokens["phase"] != "overshoot") & tokens["token_id"].notna()]
    return kept.assign(index=index.reindex(kept["rid"]).to_numpy(np.int64))[
        ["index", "position", "token_id", "segment", "phase", "row"]
    ]
