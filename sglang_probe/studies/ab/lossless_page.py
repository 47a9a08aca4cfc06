"""The report on lossless harvesting: rows gathered through lineage beside rows computed without a cache."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import Figure, dots
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.ab.lossless import DECODED, GATHERED, HERE, LosslessResult
from sglang_probe.studies.pages import deepest, facts, footer, only

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
    gathered = only(deepest(result.distance), positions=GATHERED)
    effect = f"{result.cached} against {result.reference}"
    # Across two orders, as the floors are; with one replicate there is no other order, and no floor.
    across = only(gathered, order="another")
    gathered = across if len(across) else gathered
    largest = _largest(only(gathered, comparison=effect))
    floor = _largest(gathered[gathered["comparison"] != effect] if len(gathered) else gathered)
    cached = only(result.coverage, arm=result.cached)
    covered, computed = (
        format_number(x, "percent")
        for x in (
            (cached["covered"].min(), cached["computed"].sum() / cached["positions"].sum())
            if len(cached)
            else (None, None)
        )
    )
    speed = [format_number(s, "times") for s in result.speedup]
    where = gathered["hook_point"].iloc[0] if len(gathered) else "no hook point"
    return Page(
        title=f"Lossless harvesting: {result.name}",
        answer=f"With the prefix cache on, {covered} of the positions have a row although {computed} were computed, "
        f"and gathered rows of `{where}` are at most {largest} from computed ones in relative L2 (floor {floor}).",
        picture=_distances(gathered, effect, str(where)),
        tiles=[
            Tile("positions with a row", covered, f"in `{result.cached}`, which computed {computed} of them"),
            Tile(
                "speed-up",
                " and ".join(f"{s} ×" for s in speed) or "not known",
                f"serving time of `{result.reference}` over that of `{result.cached}`, replicate by replicate",
            ),
            Tile("largest distance", largest, f"relative L2 of a gathered row to the computed one; floor {floor}"),
        ],
        lead="Gathered through lineage: the row of a reused position is that of the request that computed it. Floors "
        "are runs that differ in order, or in where prefills are cut.",
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
                tables=[*distance_tables(result), _everything(result)],
                nothing="no position was computed by both runs of a pair",
            ),
        ],
        footer=footer(result.manifest),
    )


def _largest(part: pd.DataFrame) -> str:
    return format_number(part["l2_max"].max() if len(part) else None, "scientific")


def _distances(gathered: pd.DataFrame, effect: str, where: str) -> Figure:
    """The largest distance of each comparison; of its replicates the larger."""
    largest = gathered.groupby("comparison", sort=False, as_index=False)["l2_max"].max() if len(gathered) else gathered
    if len(largest):
        largest = largest.assign(what=["floor" if c != effect else "gathered rows" for c in largest["comparison"]])
    return dots(
        largest,
        "comparison",
        "what",
        "l2_max",
        title=f"Largest distance of `{where}`, of positions that the cached run gathered",
        kind="scientific",
        x_label="largest relative L2",
        caption="Of replicates the larger. Floors: runs that differ in order, or in where prefills are cut.",
    )


def coverage_table(result: LosslessResult) -> Table:
    """Positions, rows and time of each run."""
    columns = [
        Column("run"),
        Column("covered", "positions with a row", "percent"),
        Column("positions"),
        Column("computed"),
        Column("rows"),
        Column("seconds", kind="seconds"),
    ]
    return Table(result.coverage, "Positions with a row", columns=columns)


def distance_tables(result: LosslessResult) -> list[Table]:
    """Distances at the deepest hook point, a table for each way in which the cached run came by the row."""
    part = deepest(result.distance)
    where = part["hook_point"].iloc[0] if len(part) else "rows"
    return [
        Table(found, f"`{where}`, positions {kind}", columns=_DISTANCE, long=kind != GATHERED, file="distance")
        for kind in (GATHERED, HERE, DECODED)
        if len(found := only(part, positions=kind)) or kind == GATHERED
    ]


def _everything(result: LosslessResult) -> Table:
    columns = [Column("hook_point"), Column("positions", kind="text"), *_DISTANCE]
    return Table(result.distance, "Distances at every hook point", columns=columns, long=True, file="distance")
