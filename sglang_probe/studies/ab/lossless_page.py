"""The report on lossless harvesting: rows gathered through lineage beside rows computed without a cache."""

from __future__ import annotations

from sglang_probe.report.figures import grouped_bars
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table, format_number
from sglang_probe.studies.ab.lossless import DECODED, GATHERED, HERE, LosslessResult
from sglang_probe.studies.pages import facts, footer

_DISTANCE = [
    Column("comparison"),
    Column("order"),
    Column("l2_median", "relative L2, median", "scientific"),
    Column("l2_p99", "99th percentile", "scientific"),
    Column("l2_max", "largest", "scientific"),
    Column("identical", "bit-identical", "percent"),
    Column("n", "positions"),
    Column("runs"),
]


def lossless_page(result: LosslessResult) -> Page:
    """Coverage, speed-up, and the distance of gathered rows beside the distance of a run to itself."""
    deepest = _deepest(result)
    gathered = result.distance[(result.distance["hook_point"] == deepest) & (result.distance["positions"] == GATHERED)]
    effect = f"{result.cached} against {result.reference}"
    shown = gathered[gathered["order"] == "another"]
    shown = shown if len(shown) else gathered  # one replicate: there is no other order, and no floor
    floors = shown[shown["comparison"] != effect]
    largest, floor = (
        format_number(part["l2_max"].max() if len(part) else None, "scientific", digits=1)
        for part in (shown[shown["comparison"] == effect], floors)
    )
    cached = result.coverage[result.coverage["arm"] == result.cached]
    covered = format_number(float(cached["covered"].min()), "percent")
    computed = format_number(float(cached["computed"].sum() / cached["positions"].sum()), "percent")
    speed = [format_number(s, "decimal", digits=2) for s in result.speedup]
    return Page(
        title=f"Lossless harvesting: {result.name}",
        lead=f"With the prefix cache on (`{result.cached}`) the engine computed {computed} of the positions; gathered "
        f"through lineage, {covered} of them have a row. Without the cache (`{result.reference}`) serving took "
        f"{' and '.join(speed)} times as long, replicate by replicate. Gathered rows of `{deepest}` are at most "
        f"{largest} from those that a run in another order computed (relative L2); runs of one arm in two orders, and "
        f"runs whose prefills are cut elsewhere, are at most {floor} apart.",
        tiles=[
            Tile("positions with a row", covered, f"in `{result.cached}`, which computed {computed} of them"),
            Tile("speed-up", f"{speed[0]} x", f"serving time of `{result.reference}` over the cached run"),
            Tile("largest distance", largest, f"of a gathered row; floor {floor}"),
        ],
        facts=facts(result.manifest),
        sections=[
            Section(
                heading="What a cached run covers",
                text="A reused position has no forward pass of its own. Its row is that of the request that computed "
                "it first, which the ledger names.",
                tables=[coverage_table(result)],
            ),
            Section(
                heading="How far gathered rows are from computed ones",
                text="Every comparison is over the same positions, split by how the cached run came by their row. "
                "Compare distances in the same column of order: an arm against itself is always across two orders. A "
                "cache hit also cuts the prefill at the end of the match: an arm whose prefill is cut elsewhere shows "
                "what that does. If gathered rows are farther than these, something other than rounding was gathered. "
                "These are largest distances and quantiles, not a test.",
                figures=[
                    grouped_bars(
                        # Replicates of a comparison: the larger of their largest distances.
                        shown.groupby(["positions", "comparison"], sort=False, as_index=False)["l2_max"].max(),
                        "comparison",
                        "positions",
                        "l2_max",
                        title=f"Largest relative L2 of `{deepest}`, positions that were gathered, across two orders",
                        kind="scientific",
                    )
                ],
                tables=[*distance_tables(result), _everything(result)],
            ),
        ],
        footer=footer(result.manifest),
    )


def coverage_table(result: LosslessResult) -> Table:
    """Positions, rows and time of each run."""
    columns = [
        Column("run"),
        Column("covered", "positions with a row", "percent"),
        Column("positions"),
        Column("computed"),
        Column("rows"),
        Column("seconds", kind="decimal", digits=1),
    ]
    return Table(result.coverage, "Positions with a row", columns=columns)


def distance_tables(result: LosslessResult) -> list[Table]:
    """Distances at the deepest hook point, a table for each way in which the cached run came by the row."""
    deepest = _deepest(result)
    part = result.distance[result.distance["hook_point"] == deepest]
    return [
        Table(
            part[part["positions"] == kind], f"`{deepest}`, positions {kind}", columns=_DISTANCE, long=kind != GATHERED
        )
        for kind in (GATHERED, HERE, DECODED)
        if (part["positions"] == kind).any()
    ]


def _everything(result: LosslessResult) -> Table:
    columns = [Column("hook_point"), Column("positions", kind="text"), *_DISTANCE]
    return Table(result.distance, "Distances at every hook point", columns=columns, long=True)


def _deepest(result: LosslessResult) -> str:
    return str(result.distance["hook_point"].iloc[-1])
