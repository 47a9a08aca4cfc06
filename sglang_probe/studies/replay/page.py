"""The report of an audit replay."""

from __future__ import annotations

from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.pages import facts, footer, proof
from sglang_probe.studies.replay.study import ReplayResult


def answer(result: ReplayResult) -> str:
    """Whether the run is what the manifest states."""
    served = f"{result.under} of {result.requests} requests ran under interventions"
    if result.ok:
        return f"The run is what the manifest states: {served}, and every stored row is within the floor of the replay."
    if result.silent:
        violation = next(c.violation for mine in result.checks.values() for c in mine if not c.holds)
        return f"That the run is what the manifest states is not shown ({served}): {violation}."
    wrong = [c.violation for mine in result.checks.values() for c in mine if not c.holds]
    return f"The run is not what the manifest states ({served}): {wrong[0]}."


def rows_table(result: ReplayResult) -> Table:
    """Distances of stored rows."""
    columns = [
        Column("hook_point", "hook point"),
        Column("interventions", "under interventions"),
        Column("positions"),
        Column("median", "stored to replay, median", "scientific"),
        Column("largest", "largest", "scientific"),
        Column("floor", "two replays, largest", "scientific"),
        Column("limit", "", "scientific"),
    ]
    return Table(result.rows, "relative distance of rows", columns=columns, file="rows")


def replay_page(result: ReplayResult) -> Page:
    """What was stored beside what the manifest would have made."""
    violated = sum(not c.holds for mine in result.checks.values() for c in mine)
    activations = [
        Column("entry"),
        Column("label"),
        Column("status"),
        Column("positions"),
        Column("stored", "stored, mean", "decimal"),
        Column("replayed", "replayed, mean", "decimal"),
        Column("largest", "largest difference", "scientific"),
    ]
    return Page(
        title=f"Audit replay: {result.name}",
        answer=answer(result),
        tiles=[
            Tile("requests", str(result.requests), f"{result.under} under interventions"),
            Tile("violations", str(violated), "of the run's invariants, and of the replay"),
        ],
        facts=facts(
            result.manifest, ("manifest of features", f"revision {result.revision}, sha256 {result.sha256[:16]}")
        ),
        lead="The stored requests were served again, their own tokens decoded by force, under the vectors, operations "
        "and strengths of the manifest, at the positions that the ledger has. This was done twice, in two orders: the "
        "distance between the two is the floor.",
        sections=[
            Section("Rows", tables=[rows_table(result)]),
            Section(
                "Activations",
                "Of the manifest's features, and projections on its directions, after the interventions, at positions "
                "under an intervention.",
                tables=[Table(result.activations, "activations", columns=activations, file="activations")],
                nothing="the run holds no rows at their hook points",
            ),
            Section(
                "Ledger and manifest",
                tables=[
                    Table(
                        result.differences,
                        "where they disagree",
                        columns=[Column("difference"), Column("requests")],
                        file="differences",
                    )
                ],
                nothing="they say the same",
            ),
            proof(result.checks),
        ],
        footer=footer(result.manifest),
    )
