"""The stored rows beside those of the replay, with the floor between two replays beside both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.run import schema
from sglang_probe.run.hook_points import parse_hook_point
from sglang_probe.run.run import Run
from sglang_probe.stats.distance import row_distance
from sglang_probe.steering import make
from sglang_probe.studies.base import records
from sglang_probe.studies.replay.runs import AGAIN, SHUFFLED, Replay
from sglang_probe.verify.check import Check, all_hold
from sglang_probe.verify.verify import verify
from sglang_probe.workload.request import asked_rid

Array = np.ndarray[Any, Any]
FLOORS = 2.0
"""How many times the largest distance between the two replays a stored row may be away: both are largest ones of as
many rows, drawn alike if nothing was changed."""
ROUNDING = 4e-6
"""Relative distance that is rounding in float32 after one layer; it grows like the root of the depth. The floor may be
zero, because two replays happened to have equal batches, where the stored run had others. In another dtype rounding is
what `verify.reference.tolerance` takes for it, which hides small changes: the ledger's check does not depend on it."""
_BLOCK = 4096


@dataclass(frozen=True)
class ReplayResult:
    """Everything the report and the terminal show."""

    name: str
    rows: pd.DataFrame
    """`hook_point, interventions, positions, median, largest, floor, limit`: relative L2 of stored rows to the
    replay's; the floor is the largest between two replays."""
    activations: pd.DataFrame
    """`entry, label, status, positions, stored, replayed, largest`: mean activation of the features, or projection on
    the directions, after the interventions, and the largest difference of a position."""
    differences: pd.DataFrame
    """`difference, requests`: where ledger and manifest disagree."""
    requests: int
    under: int
    checks: dict[str, list[Check]]
    revision: int
    sha256: str
    manifest: dict[str, Any]
    """Of the stored run."""

    @property
    def ok(self) -> bool:
        """Whether the run is what the manifest states."""
        return all_hold(self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "features_revision": self.revision,
            "features_sha256": self.sha256,
            "requests": self.requests,
            "under_interventions": self.under,
            **{k: records(frame, 15) for k, frame in self.tables().items()},
            "checks": [
                {"run": run, "check": c.name, "holds": c.holds, "violation": c.violation, "covered": c.covered}
                for run, mine in self.checks.items()
                for c in mine
            ],
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table."""
        return {"rows": self.rows, "activations": self.activations, "differences": self.differences}


def study_replay(
    replay: Replay, runs: Mapping[str, Run], *, tell: Callable[[str], None] = lambda _: None
) -> ReplayResult:
    """Compare the stored run with its replays."""
    tell(f"verifying {replay.stored.path}")
    checks = {replay.stored.path.name: list(verify(replay.stored))}
    tell("comparing rows")
    at = _places(replay, runs)
    rows = _distances(replay, runs, at)
    differences = _differences(replay)
    found = [_as_stated(replay, differences), _within_the_floor(rows), _gates(replay, runs[AGAIN])]
    return ReplayResult(
        name=replay.stored.path.name,
        rows=rows,
        activations=_activations(replay, runs[AGAIN], at),
        differences=differences,
        requests=len(replay.requests),
        under=replay.under,
        checks={**checks, "replay": found},
        revision=replay.manifest.revision,
        sha256=replay.manifest.sha256,
        manifest=replay.stored.manifest,
    )


def _places(replay: Replay, runs: Mapping[str, Run]) -> pd.DataFrame:
    """Every position that all three runs have a row of: `rid, position, stored, again, shuffled, under` (whether the
    stored one is marked)."""
    number = {rid: f"replay-{i}" for i, rid in enumerate(replay.names)}
    found = None
    for name, run in (("stored", replay.stored), *((n, runs[n]) for n in (AGAIN, SHUFFLED))):
        tokens = run.tokens()
        tokens = tokens[(tokens["phase"] != schema.OVERSHOOT) & (tokens["row"] >= 0)]
        rid = tokens["rid"].map(number if name == "stored" else asked_rid)
        mine = tokens.assign(rid=rid, under=tokens["intervention"].notna())
        mine = mine[mine["rid"].notna()].rename(columns={"row": name})
        kept = mine[["rid", "position", name, *(["under"] if name == "stored" else [])]]
        found = kept if found is None else found.merge(kept, on=["rid", "position"])
    assert found is not None
    return found


def _distances(replay: Replay, runs: Mapping[str, Run], at: pd.DataFrame) -> pd.DataFrame:
    found = []
    for point in runs[AGAIN].hook_points:
        here = at[replay.stored.holds(point, at["stored"].to_numpy())]
        for under in (True, False):
            some = here[here["under"] == under]
            if some.empty:
                continue
            again = _rows(runs[AGAIN], point, some[AGAIN])
            stored, floor = (
                row_distance(_rows(run, point, some[name]), again)[0]
                for run, name in ((replay.stored, "stored"), (runs[SHUFFLED], SHUFFLED))
            )
            limit = max(FLOORS * float(floor.max()), _rounding(point, again.dtype))
            found.append(
                (point, under, len(some), float(np.median(stored)), float(stored.max()), float(floor.max()), limit)
            )
    names = ["hook_point", "interventions", "positions", "median", "largest", "floor", "limit"]
    return pd.DataFrame(found, columns=names)


def _rounding(point: str, dtype: Any) -> float:
    import torch

    from sglang_probe.verify.reference import tolerance

    if dtype != torch.float32:
        return tolerance(point, dtype)
    depth = (parse_hook_point(point).layer or 0) + 1
    return float(ROUNDING * depth**0.5)


def _rows(run: Run, point: str, index: pd.Series) -> Any:
    import torch

    where = index.to_numpy()
    return torch.cat([run.rows(point, where[i : i + _BLOCK]) for i in range(0, len(where), _BLOCK)])


def _activations(replay: Replay, again: Run, at: pd.DataFrame) -> pd.DataFrame:
    names = ["entry", "label", "status", "positions", "stored", "replayed", "largest"]
    found = []
    for vector in replay.library.values():
        entry, point = replay.entries.get(vector.hash), vector.card.hook_point
        if entry is None or point not in again.hook_points:
            continue
        some = at[at["under"] & replay.stored.holds(point, at["stored"].to_numpy())]
        if some.empty:
            continue
        read = make.activations if vector.card.kind == "feature" else make.projections
        rows = _rows(replay.stored, point, some["stored"]), _rows(again, point, some[AGAIN])
        a, b = (read(x, vector.tensors) for x in rows)
        told = (entry.title, entry.label, entry.status, len(some))
        found.append((*told, a.mean(), b.mean(), np.abs(a - b).max()))
    return pd.DataFrame(found, columns=names)


def _differences(replay: Replay) -> pd.DataFrame:
    told = [d for s in replay.stated.values() for d in dict.fromkeys(s.differences)]
    told += [d for d in replay.differences for _ in range(replay.under)]
    counts = pd.Series(told, dtype=object).value_counts()
    return pd.DataFrame({"difference": list(counts.index), "requests": counts.to_numpy(dtype=np.int64)})


def _as_stated(replay: Replay, differences: pd.DataFrame) -> Check:
    violation = None
    if len(differences):
        more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        violation = f"{differences['difference'].iloc[0]} ({differences['requests'].iloc[0]} requests){more}"
    claim = "what the ledger says was done is what the manifest states"
    return Check("as the manifest states", claim, len(replay.stated), "requests", violation)


def _within_the_floor(rows: pd.DataFrame) -> Check:
    claim = "stored rows are those of the replay, within the floor of two replays"
    covered = int(rows["positions"].sum())
    if not covered:
        return Check("rows", claim, 0, "rows", "no row is held by both", None)
    finite = np.isfinite(rows[["largest", "floor", "limit"]].to_numpy(np.float64)).all(1)
    worst = rows.loc[(rows["largest"] / rows["limit"]).idxmax()] if finite.all() else rows[~finite].iloc[0]
    where = "under interventions" if worst["interventions"] else "under none"
    violation = None
    if not finite.all():
        violation = (
            f"{worst['hook_point']}, positions {where}: the distance of a stored row from the replay's, or of the two "
            "replays from each other, is not a finite number"
        )
    elif worst["largest"] > worst["limit"]:
        violation = (
            f"{worst['hook_point']}, positions {where}: a stored row is {worst['largest']:.2e} from the replay's, and "
            f"two replays {worst['floor']:.2e} from each other (limit {worst['limit']:.2e})"
        )
    return Check("rows", claim, covered, "rows", violation)


def _gates(replay: Replay, again: Run) -> Check:
    claim = "gates by a probe were decided as in the replay"
    number = {rid: f"replay-{i}" for i, rid in enumerate(replay.names)}
    stored = replay.stored.gates()
    mine = dict(zip(stored["rid"].map(number), stored["opened"], strict=True))
    gates = again.gates()
    theirs = dict(zip(gates["rid"].map(asked_rid), gates["opened"], strict=True))
    both = [rid for rid in mine if rid in set(number.values())]
    wrong = [rid for rid in both if rid not in theirs or bool(mine[rid]) != bool(theirs[rid])]
    violation = None
    if wrong:
        first = replay.names[int(wrong[0].rpartition("-")[2])]
        violation = f"{first}: its gate was {'open' if mine[wrong[0]] else 'closed'}, and is not in the replay"
    return Check("gates", claim, len(both), "gates", violation)
