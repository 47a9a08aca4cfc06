"""The report on the re-enactments: reuse before and after, verdicts, and each public report with its words."""

from __future__ import annotations

from typing import Any

import pandas as pd
from situations import SITUATIONS

from sglang_probe.report.figures import grouped_bars
from sglang_probe.report.page import Page, Section
from sglang_probe.report.tables import Column, Table


def report(found: dict[str, Any]) -> Page:
    """The page."""
    reuse, verdicts, audits = reuse_of(found), verdicts_of(found), audits_of(found)
    long = reuse.melt("situation", ["before", "after"], "when", "share") if len(reuse) else reuse
    exact = sum(bool(one["sums_exactly"]) for one in _autopsies(found))
    return Page(
        title="Public reports of lost and wrong reuse, acted out",
        answer=f"{len(found)} situations; in {len(reuse)} of them advice was followed and reuse measured again. The "
        f"causes summed to what was computed in {exact} of {len(_autopsies(found))} recorded segments.",
        picture=grouped_bars(
            long, "situation", "when", "share", title="Share of prompt tokens that was reused", caption=""
        )
        if len(reuse)
        else None,
        lead="Stock SGLang 0.5.23 on a CPU with `probe-text`. What we planted is said with each situation.",
        sections=[
            Section("Lost reuse: before the advice and after it", _REUSE, tables=[Table(reuse, columns=_COLUMNS)]),
            Section("Wrong reuse: verdicts of the gate", tables=[Table(verdicts)], nothing="no gate was asked"),
            Section("Wrong reuse: the audit", tables=[Table(audits)], nothing="no audit was made"),
            *(Section(SITUATIONS[name].name, _words(name, told)) for name, told in found.items()),
        ],
    )


_REUSE = (
    "`saved` is how many tokens fewer were computed after the advice was followed, `said` how many `why` had said at "
    "most. `predicted` is what `what-if` gave for the changed setting from the first recording alone."
)
_COLUMNS = [
    Column("situation"),
    Column("cause", "most, beside new text, by cause"),
    Column("before", "reused", "percent"),
    Column("after", "after the advice", "percent"),
    Column("predicted", "predicted", "percent"),
    Column("said", "tokens saved at most"),
    Column("saved", "tokens saved"),
]
_NEW = ("never seen", "last token", "not seen in this segment", "not known")


def reuse_of(found: dict[str, Any]) -> pd.DataFrame:
    """A row a situation with a remedy."""
    rows = []
    for name, told in found.items():
        if "after" not in told:
            continue
        before, after = told["before"], told["after"]
        again = {c: n for c, n in before["causes"].items() if c not in _NEW}
        rows.append(
            {
                "situation": SITUATIONS[name].name,
                "cause": max(again, key=lambda c: again[c]) if again else "",
                "before": before["share"],
                "after": after["share"],
                "predicted": told["predicted"]["share"] if "predicted" in told else None,
                "said": sum(again.values()),
                "saved": before["computed"] - after["computed"],
            }
        )
    return pd.DataFrame(rows, columns=["situation", "cause", "before", "after", "predicted", "said", "saved"])


def verdicts_of(found: dict[str, Any]) -> pd.DataFrame:
    """A row a gate."""
    rows = [
        {
            "situation": SITUATIONS[name].name,
            "server": which,
            "verdict": g["verdict"],
            "wrong answers": ", ".join(f"{p} {n} of {2 * g['cases']}" for p, n in g["wrong_by_path"].items()) or "none",
            "largest difference, nats": max((p["most"] for p in g["paths"]), default=None),
            "cold against cold, nats": g["yardstick_nats"],
            "greedy flips": max((p["flips"] for p in g["paths"]), default=None),
        }
        for name, told in found.items()
        for which, g in told.get("gates", {}).items()
    ]
    return pd.DataFrame(rows)


def audits_of(found: dict[str, Any]) -> pd.DataFrame:
    """A row an audit."""
    rows = [
        {
            "situation": SITUATIONS[name].name,
            "server": which,
            "found": ", ".join(f"{n} {what}" for what, n in a["found"].items()),
            "exit code": a["exit_code"],
            "origins named": len(a["origins"]),
        }
        for name, told in found.items()
        for which, a in told.get("audits", {}).items()
    ]
    return pd.DataFrame(rows)


def _autopsies(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for told in found.values() for part in told.values() if isinstance(part, dict) and "causes" in part]


def _words(name: str, told: dict[str, Any]) -> str:
    said = [f"**The report.** {SITUATIONS[name].report}", f"**Here.** {SITUATIONS[name].here}"]
    said += [
        f"**{when.capitalize()}.** `why`: {told[when]['sentence']}" for when in ("before", "after") if when in told
    ]
    for which in ("predicted_before", "predicted"):
        if which in told:
            p = told[which]
            said.append(
                f"**Predicted.** `what-if`, {p['settings']}: {p['share']:.1%} reused. Replayed as recorded, "
                f"{p['matches_that_differ']} of {p['matches']} matches differ from the engine's."
            )
    said += [
        f"**{which.capitalize()}.** `gate`: {g['verdict']}. {g['sentence']}"
        for which, g in told.get("gates", {}).items()
    ]
    return "\n\n".join(said)
