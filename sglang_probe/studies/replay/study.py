"""The stored rows beside those of the replay, with the floor between two replays beside both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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
SILENT = "rows show nothing of it"
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

    @property
    def silent(self) -> bool:
        """Whether nothing is wrong but that the rows show nothing of the interventions."""
        wrong = [c for mine in self.checks.values() for c in mine if not c.holds]
        return bool(wrong) and all((c.violation or "").startswith(SILENT) for c in wrong)

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
    checks = {}
    for name, run in ((replay.stored.path.name, replay.stored), *((f"replay {n}", runs[n]) for n in (AGAIN, SHUFFLED))):
        tell(f"verifying {run.path}")
        checks[name] = list(verify(run))
    tell("comparing rows")
    at = _places(replay, runs)
    rows = _distances(replay, runs, at)
    differences = _differences(replay)
    found = [_as_stated(replay, differences), _within_the_floor(rows, _changed_at(replay)), _gates(replay, runs)]
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
    told += ["the server clamped, and decided no gate of it"] * len(replay.undecided)
    counts = pd.Series(told, dtype=object).value_counts()
    return pd.DataFrame({"difference": list(counts.index), "requests": counts.to_numpy(dtype=np.int64)})


def _as_stated(replay: Replay, differences: pd.DataFrame) -> Check:
    violation = None
    if len(differences):
        more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        violation = f"{differences['difference'].iloc[0]} ({differences['requests'].iloc[0]} requests){more}"
    claim = "what the ledger says was done is what the manifest states"
    return Check("as the manifest states", claim, len(replay.stated), "requests", violation)


def _changed_at(replay: Replay) -> set[str]:
    """Hook points at which requests under interventions were changed."""
    under = set(replay.stored.interventions()["rid"])
    steps = [s for rid, stated in replay.stated.items() if rid in under for s in stated.steer]
    return {replay.library[s.vector].card.hook_point for s in steps}


def _shows(point: str, changed: str) -> bool:
    """Whether rows of a hook point follow a change of the residual stream at another."""
    captured, layer = parse_hook_point(point).layer, parse_hook_point(changed).layer
    return point == changed or (captured is not None and layer is not None and captured > layer)


def _within_the_floor(rows: pd.DataFrame, changed: Collection[str] = ()) -> Check:
    """The check of the rows.

    Args:
        changed: hook points of the interventions, each of which some row must follow.
    """
    claim = "stored rows are those of the replay, within the floor of two replays"
    covered = int(rows["positions"].sum())
    if not covered:
        return Check("rows", claim, 0, "rows", f"{SILENT}: no row is held by run and replays")
    finite = np.isfinite(rows[["largest", "floor", "limit"]].to_numpy(np.float64)).all(1)
    worst = rows.loc[(rows["largest"] / rows["limit"]).idxmax()] if finite.all() else rows[~finite].iloc[0]
    under = rows["hook_point"][rows["interventions"].astype(bool)]
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
    elif unseen := [c for c in sorted(changed) if not any(_shows(p, c) for p in under)]:
        violation = f"{SILENT}: no row under interventions is held by run and replays from {unseen[0]} on"
    return Check("rows", claim, covered, "rows", violation)


def _gates(replay: Replay, runs: Mapping[str, Run]) -> Check:
    """Gates must be decided alike in both replays too: rows of a request whose gate was open in one and closed in the
    other are far from each other, and would be the floor."""
    claim = "gates by a probe were decided as in the replay, and alike in both replays"
    number = {rid: f"replay-{i}" for i, rid in enumerate(replay.names)}
    decided = {"stored": _opened(replay.stored, number.get)}
    decided |= {name: _opened(runs[name], asked_rid) for name in (AGAIN, SHUFFLED)}
    asked = [rid for rid in number.values() if any(rid in d for d in decided.values())]
    wrong = [rid for rid in asked if len({d.get(rid) for d in decided.values()}) > 1]
    violation = None
    if wrong:
        words = {True: "open", False: "closed", None: "not decided"}
        stored, again, shuffled = (words[d.get(wrong[0])] for d in decided.values())
        first = replay.names[int(wrong[0].rpartition("-")[2])]
        violation = f"{first}: its gate was {stored}, and is {again} in the replay and {shuffled} in the other order"
    return Check("gates", claim, len(asked), "gates", violation)


def _opened(run: Run, number: Callable[[str], str | None]) -> dict[str, bool]:
    """Whether the gate of each request opened, by its number in the replay."""
    gates = run.gates()
    told = ((number(rid), bool(opened)) for rid, opened in zip(gates["rid"], gates["opened"], strict=True))
    return {rid: opened for rid, opened in told if rid is not None}
