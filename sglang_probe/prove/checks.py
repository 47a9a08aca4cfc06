"""What is asked of a recording of a proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_probe.prove.owners import Owners, compare, unended
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.verify.check import Check
from sglang_probe.verify.verify import verify


@dataclass(frozen=True)
class Asked:
    """A check, how long it took, and which level of the proof it belongs to (P1 to P4)."""

    level: str
    check: Check
    seconds: float

    def to_json(self) -> dict[str, Any]:
        c = self.check
        told = {"level": self.level, "name": c.name, "claim": c.claim, "holds": c.holds, "covered": c.covered}
        return {**told, "unit": c.unit, "violation": c.violation, "note": c.note, "seconds": round(self.seconds, 2)}


def timed(level: str, ask: Callable[[], Check]) -> Asked:
    """Ask, and take the time."""
    began = time.perf_counter()
    check = ask()
    return Asked(level, check, time.perf_counter() - began)


def invariants(run: Run, name: str) -> Check:
    """Every invariant of `verify`; the rows are those whose embedding is that of their token."""
    checks = verify(run)
    wrong = next((c for c in checks if not c.holds), None)
    claim = f"{len(checks)} invariants of the ledger and of its rows hold"
    content = next((c for c in checks if c.name == "content"), None)
    violation = None if wrong is None else f"{wrong.name}: {wrong.violation}"
    if violation is None and content is None:
        violation = "no row was compared with the embedding of its token"
    covered = 0 if content is None else content.covered
    return Check(f"invariants, {name}", claim, covered, "rows", violation)


def owners_right(true: Owners, name: str) -> Check:
    """The lineage at every forward pass against the owners that were read from the device."""
    claim = "every attended position was written by the request that the lineage says, at that position"
    violation = true.violation
    if violation is None and not true.compared:
        violation = "nothing was compared"
    return Check(f"owners, {name}", claim, true.compared, "positions", violation)


def owners_written(run: Run, true: Owners, name: str) -> Check:
    """The finished run against the same owners."""
    compared, wrong = compare(run, true)
    return Check(f"written owners, {name}", "the finished run says the same", compared, "positions", wrong)


def all_ended(run: Run, rids: Sequence[str], name: str) -> Check:
    """No request is left open."""
    left = unended(run, rids)
    violation = f"{len(left)} never ended, the first {left[0]}" if left else None
    return Check(f"ends, {name}", "every request has an end", len(rids), "requests", violation)


def reached(runs: Iterable[Run], *, cached: bool, prefill_graphs: bool = False) -> Check:
    """What the traffic made the engine do: a proof in which nothing was reused proves nothing of reuse.

    Args:
        cached: whether the engine has a prefix cache.
        prefill_graphs: whether forwards with prompts may be replayed.
    """
    names = ("reused", "rebound", "retracted", "aborted", "mixed", "chunked", "replayed", "replayed prefill")
    counts = dict.fromkeys(names, 0)
    for run in runs:
        spans, forwards, requests = run.spans(), run.forwards(), run.engine_requests()
        counts["reused"] += int((spans["end"] - spans["start"])[spans["status"] == schema.REUSED].sum())
        counts["rebound"] += len(run.rebinds())
        counts["retracted"] += int((requests["retractions"] > 0).sum())
        counts["aborted"] += int((requests["finish_reason"] == "abort").sum())
        counts["mixed"] += int((forwards["mode"] == "mixed").sum())
        counts["chunked"] += int((spans["chunk"] > 0).sum())
        counts["replayed"] += int(forwards["graph"].sum())
        counts["replayed prefill"] += int((forwards["graph"] & (forwards["mode"] != "decode")).sum())
    units = {"reused": "positions", "rebound": "spans", "chunked": "later chunks"}
    units |= {"retracted": "requests", "aborted": "requests", "mixed": "forwards", "replayed": "forwards"}
    units |= {"replayed prefill": "forwards"}
    note = ", ".join(f"{name} {n:,} {units[name]}" for name, n in counts.items())
    violation = None
    if cached and not counts["reused"]:
        violation = "no position was reused, so that nothing is proved of reuse"
    elif prefill_graphs and not counts["replayed prefill"]:
        violation = "prefill graphs are in force, and no forward with a prompt was replayed: nothing is proved of them"
    return Check("reached", "the traffic reused entries", counts["reused"], "positions", violation, note)


def graphs(checked: dict[str, Any] | None, *, decode: bool, prefill: bool) -> Asked:
    """The check of every captured graph, which the engine made when it started and would not have started without
    (`engine/hooks/instruments/graph_check.py`).

    Args:
        checked: what the manifest says of it. decode, prefill: whether there are graphs of that phase.
    """
    claim = "every captured graph writes every row, of its own token, and as the eager forward does"
    sizes = {phase: (checked or {}).get(key, []) for phase, key in (("decode", "sizes"), ("prefill", "prefill_sizes"))}
    unchecked = [phase for phase, there in (("decode", decode), ("prefill", prefill)) if there and not sizes[phase]]
    violation = f"{' and '.join(unchecked)} graphs are in force, and none was checked" if unchecked else None
    if checked is None:
        return Asked("P1", Check("graphs", claim, 0, "graphs", violation, None if violation else "no graphs"), 0.0)
    worst = max(checked["worst"], key=lambda h: checked["worst"][h])
    of = "; ".join(f"{phase}: {s[0]} to {s[-1]} tokens" for phase, s in sizes.items() if s)
    note = (
        f"{of}; replay against eager: worst {worst}, "
        f"{checked['worst'][worst]:.1e}; equal to the bit: {min(checked['equal'].values()):.0%} or more of the rows"
    )
    number = sum(map(len, sizes.values()))
    return Asked("P1", Check("graphs", claim, number, "graphs", violation, note), checked["seconds"])
