"""The report on causes of computed tokens."""

from __future__ import annotations

from sglang_probe.report.figures import grouped_bars
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.run.causes import Cause
from sglang_probe.studies.why.study import WhyResult

_HOW = (
    "Each position that a prefill computed is put against what the radix tree took, gave and lost, in one order: what "
    "earlier requests had in common with the prompt, what the tree had held of it at any earlier moment, and what "
    "could be given (whole pages, all but the last token). `sglang-probe verify` asks that the causes sum to the "
    "engine's own prefill tokens, forward by forward, and that there was an eviction between the last moment at which "
    "the tree had what counts as evicted and the moment at which it was asked for it."
)
_WORDS = (
    "Diverged: at least 16 tokens in a row that an earlier request holds too, computed again because what comes before "
    "them differs. Savings are what these tokens cost in this run. They are not promised: what is saved must fit into "
    "the cache, and savings of several remedies overlap with evictions that they would cause."
)


def answer(result: WhyResult) -> str:
    """What was found, in a sentence."""
    whose = f"of request `{result.rid}` " if result.rid else ""
    total = result.computed + result.reused
    share = f" ({100 * result.reused / total:.1f} %)" if total else ""
    said = f"{result.computed:,} prompt tokens {whose}were computed and {result.reused:,}{share} reused"
    if result.remedies.empty:
        known = "" if str(Cause.NOT_IN_SEGMENT) not in set(result.causes["cause"]) else " as far as this segment knows"
        return f"{said}; nothing that was computed could have been reused{known}."
    top = result.remedies.iloc[0]
    avoidable = int(result.remedies["tokens"].sum())
    return (
        f"{said}. Of the computed ones {avoidable:,} were computed before; most of these, {int(top['tokens']):,}, for "
        f"one cause, **{top['what']}**: {top['remedy']}."
    )


def causes_table(result: WhyResult) -> Table:
    """Tokens by cause."""
    columns = [Column("cause"), Column("tokens"), Column("share", "of the computed", "percent"), Column("requests")]
    return Table(result.causes, "why tokens were computed", columns=columns, file="causes")


def remedies_table(result: WhyResult) -> Table:
    """What would save how many."""
    columns = [
        Column("what", "cause"),
        Column("tokens", "tokens saved at most"),
        Column("requests"),
        Column("remedy", "what to do"),
        Column("example"),
    ]
    frame = result.remedies.assign(**{n: result.remedies[n].str.replace("`", "") for n in ("remedy", "example")})
    return Table(frame, "what to do", columns=columns, file="remedies")


def pieces_table(result: WhyResult) -> Table:
    """Every run of positions."""
    columns = [
        Column("rid", "request"),
        Column("attempt"),
        Column("start", kind="text"),
        Column("end", kind="text"),
        Column("cause"),
        Column("difference"),
        Column("nearest", "nearest request"),
        Column("common", "tokens in common", "text"),
        Column("forward_id", "forward", "text"),
    ]
    return Table(result.pieces, "positions and their causes", columns=columns, file="pieces")


def why_page(result: WhyResult) -> Page:
    """The causes, what to do, and where."""
    frame = result.causes.assign(of="tokens")
    picture = grouped_bars(
        frame,
        "cause",
        "of",
        "tokens",
        title="Why prompt tokens were computed",
        caption=f"{result.computed:,} computed tokens, each with one cause.",
    )
    new = frame.loc[frame["cause"].isin([str(Cause.NEVER_SEEN), str(Cause.LAST_TOKEN)]), "tokens"].sum()
    groups = [
        Column("group", result.grouped_by),
        *map(Column, ("requests", "computed", "reused", "avoidable", "mostly")),
    ]
    return Page(
        title=f"Why was this not reused? {result.rid or ''}".strip(),
        answer=answer(result),
        picture=picture if len(frame) else None,
        tiles=[
            Tile("computed", f"{result.computed:,}", "prompt tokens, and generated ones after a retraction"),
            Tile("reused", f"{result.reused:,}", "taken from the cache"),
            Tile("new", f"{int(new):,}", "never seen before, or the last token"),
            Tile("computed again", f"{int(result.remedies['tokens'].sum()):,}", "seen before, for one of the causes"),
        ],
        facts=[("run", result.run), *([("request", result.rid)] if result.rid else [])],
        sections=[
            Section("What to do", _WORDS, tables=[remedies_table(result)], nothing="nothing was computed twice"),
            Section(
                "Where",
                tables=[
                    causes_table(result),
                    Table(result.by_segment, "by segment of the prompt", file="by_segment"),
                    Table(result.by_group, f"by {result.grouped_by}", columns=groups, file="by_group"),
                ],
                notes=list(result.notes),
            ),
            Section("How it was found", _HOW, tables=[pieces_table(result)]),
        ],
    )
