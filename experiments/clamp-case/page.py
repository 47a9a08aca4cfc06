"""The report of the case."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sglang_probe.report.figures import grouped_bars
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Table


def report(summary: dict[str, Any]) -> Page:
    """What was found, on one page."""
    production, chosen, made = summary["production"], summary["chosen"], summary["library"]
    by_kind = pd.DataFrame(
        [{"arm": arm, "kind": kind, **told} for arm, kinds in summary["arms"].items() for kind, told in kinds.items()]
    )
    effects = pd.DataFrame([{"arm": arm, **halves["held out"]} for arm, halves in summary["effect"].items()])
    of_clamp = effects.set_index("arm")["effect"]
    random = max(of_clamp[[a for a in of_clamp.index if a.startswith("random")]])
    sections = [
        Section("Where the behaviour is decided", "Share of the log-odds that a refused twin's residual takes.",
                tables=[_table(summary["where"], "patches", "where")]),
        Section("Latents by the effect of their ablation", "On selection objects.",
                tables=[_table(chosen["ablated"], "ablated", "ablated")]),
        Section("The cap of the direction", "On selection objects: the mildest under which every text stops is taken.",
                tables=[_table(chosen["caps"], "caps", "caps")]),
        Section("Arms at doses", "On held-out objects, in `transformers`, without a gate of intent.",
                tables=[_table(summary["frontier"], "frontier", "frontier")]),
        Section("Arms in the engine", "Without a gate of intent. The effect is the change of the share of replies that "
                "are the refusal and nothing else, on held-out objects; a random direction is capped where that "
                f"changes the deciding row by as much as the cap does ({made['change']:.1f} of {made['way']:.1f}).",
                tables=[Table(effects, "effect", file="effect"), Table(by_kind, "arms", file="arms")]),
    ]  # fmt: skip
    answer = "The direction shows no effect on held-out objects, and was not deployed."
    title = "Replies that are the refusal and nothing else"
    picture = grouped_bars(by_kind[by_kind["kind"].isin(["split", "refused"])], "arm", "kind", "clean", title=title)
    if production is not None:
        answer, picture = (
            _answer(summary),
            grouped_bars(
                pd.DataFrame(_served(production)).query("serving == 'alone'"), "kind", "server", "clean", title=title
            ),
        )
        served = [
            Section("Two servers", "Without the cap, and with it and its gate.",
                    tables=[_table(_served(production), "production", "production")]),
            Section("Out of scope", "Requests that the gate left out, and how many of them differ in any bit from the "
                    "server without the cap; the floor is two plain runs of that. Apart: requests that found another "
                    "part of their prompt in the prefix cache than without the cap.",
                    tables=[_table(_costs(production), "collateral", "collateral")]),
            Section("Audit", "What the server with the cap stored, served again; and what must not hold.",
                    tables=[_table(_audits(summary["audit"]), "audits", "audits"),
                            _table(summary["audit"]["honest"]["rows"], "rows of the honest audit", "audit")]),
        ]  # fmt: skip
        sections = [*served, *reversed(sections)]
    statuses = ", ".join(f"{title} {status}" for title, status in summary["manifest"]["status"].items())
    return Page(
        title="A cap on split-personality replies",
        answer=answer,
        picture=picture,
        tiles=[
            Tile("direction", f"{of_clamp['contrast']:.2f}", "more clean refusals, held-out objects"),
            Tile("random", f"{random:.2f}", "the largest of five, equal change"),
            Tile("latent", f"{of_clamp['clamp']:.2f}", f"feature {chosen['feature']} of layer {chosen['layer']}"),
            Tile("manifest", str(summary["manifest"]["revision"]), statuses.replace("`", "")),
        ],
        sections=sections,
    )


def _table(rows: list[dict[str, Any]], name: str, file: str) -> Table:
    return Table(pd.DataFrame(rows), name, file=file)


def _answer(summary: dict[str, Any]) -> str:
    alone, audit = summary["production"]["alone"], summary["audit"]
    before, after = (alone[k]["split"] for k in ("plain", "clamped"))
    mine = alone["collateral"]["clamped"]
    equal, other = (
        f"{max(mine[k][what] for what in ('outputs', 'logprobs', 'rows'))} of {mine[k]['requests']}"
        for k in ("equal reuse", "other reuse")
    )
    return (
        f"Of {before['requests']} requests that the model refuses and answers all the same, {after['clean']} get the "
        f"refusal alone under the cap, and {before['clean']} without it. Of requests that the gate left out {equal} "
        f"differ in any bit, and {other} that found another part of their prompt in the prefix cache. The audit "
        f"{'holds' if audit['honest']['ok'] else 'does not hold'}."
    )


def _served(production: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"serving": way, "server": name, "kind": kind, **told}
        for way, mine in production.items()
        for name in ("plain", "clamped")
        for kind, told in mine[name].items()
    ]


def _costs(production: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"serving": way, "compared": {"clamped": "with the cap", "floor": "floor"}[name], "prefix cache": reuse, **told}
        for way, mine in production.items()
        for name in ("clamped", "floor")
        for reuse, told in mine["collateral"][name].items()
    ]


def _audits(audit: dict[str, Any]) -> list[dict[str, Any]]:
    names = {"honest": "the manifest", "tampered": "its value a hundredth off"}
    rows = [
        {"audit": title, "found": "holds" if audit[k]["ok"] else "; ".join(audit[k]["violations"])}
        for k, title in names.items()
    ]
    return rows + [{"audit": k, "found": audit[k]} for k in ("other weights", "other vector")]
