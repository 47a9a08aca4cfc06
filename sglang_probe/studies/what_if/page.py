"""The report of a replay under other settings."""

from __future__ import annotations

from sglang_probe.report.figures import grouped_bars
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.what_if.study import WhatIfResult


def answer(result: WhatIfResult) -> str:
    """What would have been reused."""
    last = result.table.iloc[-1]
    if len(result.table) == 1:
        said = "The recorded settings were replayed, and no others"
    else:
        more = int(last["difference"])
        which = "more" if more >= 0 else "fewer"
        said = f"With {last['settings']} {abs(more):,} prompt tokens {which} would have been reused"
    check = (
        "the same to the token in every match"
        if result.differ == 0
        else f"{result.differ:,} of {len(result.requests):,} matches differ"
    )
    return (
        f"{said}. Check: under the recorded settings the replay gives {result.replayed:,} reused tokens, the engine "
        f"gave {result.recorded:,}; {check}."
    )


def settings_table(result: WhatIfResult) -> Table:
    """A row for each replay."""
    columns = [
        Column("settings"),
        Column("schedule"),
        Column("reused"),
        Column("share", "of the prompts", "percent"),
        Column("difference", "to the recorded settings"),
        Column("did_not_fit", "did not fit"),
    ]
    return Table(result.table, "replays", columns=columns, file="settings")


def what_if_page(result: WhatIfResult) -> Page:
    """The replays, and how far they can be believed."""
    frame = result.table.assign(what=result.table["settings"] + " (" + result.table["schedule"] + ")", of="reused")
    picture = grouped_bars(frame, "what", "of", "share", title="Reused prompt tokens", kind="percent")
    return Page(
        title="What if the cache were another?",
        answer=answer(result),
        picture=picture,
        tiles=[
            Tile("recorded", f"{result.recorded:,}", "prompt tokens that the engine reused"),
            Tile("replayed", f"{result.replayed:,}", "under the same settings"),
            Tile("matches that differ", f"{result.differ:,}", f"of {len(result.requests):,}"),
        ],
        facts=[("run", result.run)],
        sections=[
            Section("Replays", tables=[settings_table(result)], notes=list(result.notes)),
            Section(
                "How",
                "SGLang's radix tree and slot allocator are made without a model, and given every match, forward, "
                "publication and end of the run in the recorded order. Did not fit: allocations that found no slots "
                "even after eviction, where the engine would have let a request wait or retracted one.",
            ),
        ],
    )
