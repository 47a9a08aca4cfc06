"""The budget of interventions: it changes as it says, and what it left out is marked as under nothing."""

from __future__ import annotations

import pandas as pd

from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.steering.config import EXCEEDED, UNSTEERED, WITHIN
from sglang_probe.verify.check import Check


def has_budget(run: Run) -> bool:
    """Whether the run had a budget of interventions."""
    return not run.budget().empty or (run.manifest.get("steer") or {}).get("budget_ms") is not None


def budget_holds(run: Run) -> Check:
    """Requests went without what they asked only while the budget was exceeded, and nothing of them is marked."""
    name = "budget"
    claim = "the budget was exceeded when it says so; a request went without its interventions only then, and no "
    claim += "position that it computed is marked"
    events = run.budget()
    violation = _states(run, events) or _unsteered(run, events)
    told = events["event"].value_counts()
    note = ", ".join(f"{event}: {told.get(event, 0)}" for event in (EXCEEDED, WITHIN, UNSTEERED))
    return Check(name, claim, len(events), "events", violation, note)


def _states(run: Run, events: pd.DataFrame) -> str | None:
    steer = run.manifest.get("steer") or {}
    limit, action = steer.get("budget_ms"), steer.get("over_budget")
    # An engine that died, and the segment before, may have left it exceeded.
    carried = "segment" in run.manifest or len(schema.starts_of(run.manifest)) > 1
    for rank, mine in events.groupby("dp_rank"):
        exceeded = None if carried else False
        ever = carried
        before = -1
        for e in mine.itertuples():
            where = f"rank {rank}, forward {e.forward_id}"
            if e.event not in (EXCEEDED, WITHIN, UNSTEERED):
                return f"{where}: `{e.event}` is nothing that becomes of a budget"
            if e.forward_id < before:
                return f"{where}: it is told after what happened in forward {before}"
            before = e.forward_id
            if limit is not None and abs(e.budget_ms - limit) > 1e-6 * limit:
                return f"{where}: a budget of {e.budget_ms:g} ms, and the manifest has one of {limit:g}"
            if (e.event == UNSTEERED) != isinstance(e.rid, str):
                return f"{where}: a request belongs to `{UNSTEERED}` and to nothing else"
            if e.event == EXCEEDED:
                if exceeded and not carried:
                    return f"{where}: it was exceeded already"
                if not e.milliseconds > e.budget_ms:
                    return f"{where}: it was exceeded by {e.milliseconds:g} ms, and {e.budget_ms:g} are allowed"
                exceeded = ever = True
            elif not ever or (e.event == WITHIN and exceeded is False and not carried):
                return f"{where}: `{e.event}`, and it was not exceeded"
            elif e.event == WITHIN:
                if e.milliseconds > e.budget_ms:
                    return f"{where}: it was kept again at {e.milliseconds:g} ms, and {e.budget_ms:g} are allowed"
                exceeded = False
            elif action == "refuse":
                return f"{where}: {e.rid} was served without its interventions, and the budget says `refuse`"
    return None


def _unsteered(run: Run, events: pd.DataFrame) -> str | None:
    left_out = set(events.loc[events["event"] == UNSTEERED, "rid"])
    if not left_out:
        return None
    for name, table in (("interventions", run.interventions()), ("gates", run.gates())):
        if both := sorted(left_out & set(table["rid"])):
            return f"{both[0]}: it was served without its interventions, and is in the table `{name}`"
    spans = run.spans()
    mine = spans[spans["rid"].isin(left_out) & spans["intervention"].notna()]
    if len(mine):
        s = mine.iloc[0]
        return f"{s['rid']} positions {s['start']} to {s['end']}: marked, and it was served without its interventions"
    return None
