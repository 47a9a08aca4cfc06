"""The report of the case."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sglang_probe.report.figures import grouped_bars
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Table


def report(summary: dict[str, Any]) -> Page:
    """What was found, on one page."""
    production, chosen = summary["production"], summary["chosen"]
    by_kind = pd.DataFrame(
        [{"arm": arm, "kind": kind, **told} for arm, kinds in summary["arms"].items() for kind, told in kinds.items()]
    )
    sections = [
        Section("Where the behaviour is decided", "Share of the log-odds that a refused twin's residual takes.",
                tables=[Table(pd.DataFrame(summary["where"]), "patches", file="where")]),
        Section("Latents by the effect of their ablation", "On selection objects.",
                tables=[Table(pd.DataFrame(chosen["ablated"]), "ablated", file="ablated")]),
        Section("Arms at doses", "On held-out objects, in `transformers`, without a gate of intent.",
                tables=[Table(pd.DataFrame(summary["frontier"]), "frontier", file="frontier")]),
        Section("Arms in the engine", "Without a gate of intent.", tables=[Table(by_kind, "arms", file="arms")]),
    ]  # fmt: skip
    if production is None:
        answer = "The feature shows no effect on held-out objects, and was not deployed."
        picture = grouped_bars(by_kind, "kind", "arm", "incidents", title="Replies with content after a refusal")
    else:
        alone = production["alone"]
        served = pd.DataFrame(
            [
                {"serving": way, "server": name, "kind": kind, **told}
                for way, mine in production.items()
                for name in ("plain", "clamped")
                for kind, told in mine[name].items()
            ]
        )
        costs = pd.DataFrame(
            [
                {
                    "serving": way,
                    "compared": name,
                    "requests": mine["collateral"]["left_out"],
                    **mine["collateral"][name],
                }
                for way, mine in production.items()
                for name in ("clamped", "floor")
            ]
        )
        before, after = (alone[k]["split"]["incidents"] for k in ("plain", "clamped"))
        c = alone["collateral"]
        answer = (
            f"{before} incidents before, {after} under the clamp; of {c['left_out']} requests that the gate left out, "
            f"{max(c['clamped'][k] for k in ('outputs', 'logprobs', 'rows'))} differ in any bit; the audit "
            f"{'holds' if summary['audit']['honest']['ok'] else 'does not hold'}."
        )
        picture = grouped_bars(
            served[served["serving"] == "alone"],
            "kind",
            "server",
            "incidents",
            title="Replies with content after a refusal",
        )
        sections += [
            Section("Two servers", "The clamp has its gate.", tables=[Table(served, "production", file="production")]),
            Section("Out of scope", "Requests that differ in any bit; the floor is two plain runs.",
                    tables=[Table(costs, "collateral", file="collateral")]),
            Section("Audit", tables=[Table(pd.DataFrame(summary["audit"]["honest"]["rows"]), "audit", file="audit")]),
        ]  # fmt: skip
    effect = summary["effect"]["clamp"]["held out"]
    return Page(
        title="A clamp on split-personality replies",
        answer=answer,
        picture=picture,
        tiles=[
            Tile("feature", str(chosen["feature"]), f"layer {chosen['layer']}, {summary['manifest']['status']}"),
            Tile("effect", f"{effect['effect']:.2f}", "share of clean refusals, held-out objects"),
            Tile("control", f"{summary['effect']['control']['held out']['effect']:.2f}", "another latent, same value"),
        ],
        sections=sections,
    )
