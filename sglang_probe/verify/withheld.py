"""Withheld positions: neither their rows nor their token ids are in the run, every gap has its reason, and no row is
there whose token is not known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.run import tokens as positions
from sglang_probe.run.run import Run
from sglang_probe.verify.check import Check

Array = np.ndarray[Any, Any]
NEIGHBOUR, UNKNOWN = "neighbour", "unknown"


def has_withheld(run: Run) -> bool:
    """Whether anything in the run says that positions were withheld."""
    return bool(run.manifest.get("withheld")) or not run.withheld().empty


def withheld_positions(run: Run, rid_N: Array, position_N: Array) -> Array:
    """The reason of each position, str `[N]`; empty: it is not withheld."""
    out = np.full(len(rid_N), "", dtype=object)
    table = run.withheld() if run.manifest.get("withheld") else None
    if table is None or table.empty:
        return out
    names = pd.Index(table["rid"].unique())
    table = table.assign(code=names.get_indexer(table["rid"])).sort_values(["code", "start"], kind="stable")
    key = table["code"].to_numpy(np.int64) << 32 | table["start"].to_numpy(np.int64)
    code = names.get_indexer(rid_N)
    at = np.searchsorted(key, code.astype(np.int64) << 32 | position_N.astype(np.int64), side="right") - 1
    inside = (code >= 0) & (at >= 0)
    at = np.where(inside, at, 0)
    inside &= (table["code"].to_numpy()[at] == code) & (position_N < table["end"].to_numpy()[at])
    out[inside] = table["reason"].to_numpy()[at[inside]]
    return out


def nothing_withheld_is_there(run: Run) -> Check:
    """No row and no token id of a withheld position is in the run, and no other token id is missing."""
    name = "withheld"
    claim = (
        "of a withheld position no hook point holds a row; its token id is not there, and no other one is missing; "
        "every position without a known token is withheld; the manifest counts them"
    )
    table = run.withheld()
    covered = int((table["end"] - table["start"]).sum())
    violation = _table(run, table) or _rows(run) or _ids(run)
    return Check(name, claim, covered, "positions", violation)


def _table(run: Run, table: pd.DataFrame) -> str | None:
    told = run.manifest.get("withheld")
    if not isinstance(told, dict):
        return "positions are withheld, and the manifest does not say by which rule"
    for s in table.itertuples():
        if not 0 <= s.start < s.end:
            return f"{s.rid} positions {s.start} to {s.end}: it holds no position"
        if s.reason not in (NEIGHBOUR, UNKNOWN) and not str(s.reason).startswith("pii:"):
            return f"{s.rid} positions {s.start} to {s.end}: `{s.reason}` is no reason"
    ordered = table.sort_values(["rid", "start"], kind="stable")
    same = ordered["rid"].to_numpy()[1:] == ordered["rid"].to_numpy()[:-1]
    twice = same & (ordered["start"].to_numpy()[1:] < ordered["end"].to_numpy()[:-1])
    if twice.any():
        s = ordered.iloc[int(np.argmax(twice)) + 1]
        return f"{s['rid']} position {s['start']} is withheld twice"
    counted = (table["end"] - table["start"]).groupby(table["reason"]).sum().to_dict()
    if {k: int(v) for k, v in counted.items()} != told.get("positions"):
        return f"{counted} positions are withheld, and the manifest counted {told.get('positions')}"
    return None


def _rows(run: Run) -> str | None:
    spans = run.spans()
    tokens = positions.expand(spans[spans["row_start"] >= 0])
    away = withheld_positions(run, tokens["rid"].to_numpy(), tokens["position"].to_numpy()) != ""
    known = {r.rid: len(_ids_of(r)) for r in run.requests(interrupted=True).itertuples()}
    strange = ~away & (tokens["position"] >= tokens["rid"].map(known).fillna(0)).to_numpy()
    if strange.any():
        at = tokens.iloc[int(np.argmax(strange))]
        return f"{at['rid']} position {at['position']} has no known token, and is not withheld"
    gone = tokens["row"].to_numpy()[away]
    for hook_point in run.hook_points:
        for numbers, _ in run.iter_shards(hook_point):
            if (bad := np.isin(numbers, gone)).any():
                row = int(numbers[int(np.argmax(bad))])
                at = tokens.iloc[int(np.flatnonzero(tokens["row"].to_numpy() == row)[0])]
                return f"{hook_point} holds row {row}, of {at['rid']} position {at['position']}, which is withheld"
    return None


def _ids(run: Run) -> str | None:
    for r in run.requests(interrupted=True).itertuples():
        if r.prompt_ids is None:
            if r.output_ids is not None and (np.asarray(r.output_ids) >= 0).any():
                return f"{r.rid}: its prompt is not known, and token ids of its output are there"
            continue
        ids = _ids_of(r)
        reason = withheld_positions(run, np.full(len(ids), r.rid, dtype=object), np.arange(len(ids)))
        own = (reason != "") & (reason != NEIGHBOUR)
        if (bad := own != (ids < 0)).any():
            p = int(np.argmax(bad))
            return f"{r.rid} position {p}: " + (
                "it is withheld, and its token id is there" if own[p] else "its token id is missing without a reason"
            )
    return None


def _ids_of(r: Any) -> Array:
    """Token ids of a request whose place is known."""
    if r.prompt_ids is None:
        return np.empty(0, np.int64)
    return np.array([*r.prompt_ids, *(() if r.output_ids is None else r.output_ids)], dtype=np.int64)
