"""Drift: how far the rows of two runs differ at positions that both computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ProbeError
from sglang_probe.run.run import Run
from sglang_probe.stats.distance import row_distance

_CHUNK = 65536


@dataclass(frozen=True)
class Compared:
    """Positions that both runs computed with a captured row, and the distance of their rows per hook point.

    `positions` has columns index (request), cluster (its prefix family, or itself), position, segment, phase, row_a,
    row_b; the float32 arrays align with it.
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
    a: Run, b: Run, a_tokens: pd.DataFrame, b_tokens: pd.DataFrame, *, until: pd.Series | None = None
) -> Compared:
    """Compare two runs of the same requests, `b` being the reference.

    Args:
        until: per request (by index) the first position whose tokens differ; positions from there on are left out. None
            if the outputs are the same.

    Raises:
        ProbeError: a position holds different tokens in the two runs.
    """
    joined = _rows_of(a, a_tokens).merge(_rows_of(b, b_tokens), on=["index", "position"], suffixes=("_a", "_b"))
    if until is not None and len(joined):
        joined = joined[joined["position"] < joined["index"].map(until)]
    wrong = joined[joined["token_id_a"] != joined["token_id_b"]]
    if len(wrong):
        w = wrong.iloc[0]
        raise ProbeError(
            f"{a.path} and {b.path} hold different tokens at request {w['index']}, position {w['position']}; "
            "their rows cannot be compared"
        )
    joined = joined[joined["phase_a"] == joined["phase_b"]].reset_index(drop=True)
    requests = b.requests().set_index("index")
    family = requests["family"].where(requests["family"].notna(), requests["rid"])
    positions = joined.rename(columns={"phase_a": "phase", "segment_a": "segment"})[
        ["index", "position", "segment", "phase", "row_a", "row_b"]
    ].assign(cluster=pd.Categorical(joined["index"].map(family)))
    measures: list[dict[str, np.ndarray[Any, Any]]] = [{}, {}, {}]
    for hook_point in a.hook_points:
        held = a.holds(hook_point, positions["row_a"].to_numpy()) & b.holds(hook_point, positions["row_b"].to_numpy())
        if not held.all():
            raise ProbeError(
                f"`{hook_point}` was not captured at all positions, and studies of pairs compare all of them",
                fix="record without `rows`",
            )
        parts = [
            row_distance(a.rows(hook_point, part["row_a"].to_numpy()), b.rows(hook_point, part["row_b"].to_numpy()))
            for part in (positions.iloc[i : i + _CHUNK] for i in range(0, len(positions), _CHUNK))
        ]
        for i, measure in enumerate(measures):
            pieces = [p[i].astype(np.float32) for p in parts]
            measure[hook_point] = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
    return Compared(positions, *measures)


def in_common(compared: Sequence[Compared]) -> list[Compared]:
    """The comparisons, over the positions that all of them have: means over other positions are not comparable."""
    if not compared:
        return []
    keys = [pd.MultiIndex.from_frame(c.positions[["index", "position", "phase"]]) for c in compared]
    common = keys[0]
    for key in keys[1:]:
        common = common.intersection(key, sort=False)
    return [c.at(np.asarray(key.isin(common))) for c, key in zip(compared, keys, strict=True)]


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


def _rows_of(run: Run, tokens: pd.DataFrame) -> pd.DataFrame:
    """Positions with a captured row: index, position, token_id, segment, phase, row."""
    index = run.requests().set_index("rid")["index"]
    kept = tokens[(tokens["row"] >= 0) & (tokens["phase"] != "overshoot") & tokens["token_id"].notna()]
    return kept.assign(index=kept["rid"].map(index))[["index", "position", "token_id", "segment", "phase", "row"]]
