"""The report of a monitored stream."""

from __future__ import annotations

from sglang_probe.report.figures import lines
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.monitor.study import MOST_DIMENSIONS, MonitorResult

_MOST_CURVES = 6


def answer(result: MonitorResult) -> str:
    """What was found, in a sentence or two."""
    n, alarms = len(result.trajectories), int(result.trajectories["alarm"].sum())
    share = format_number(result.options.share, "percent")
    text = f"{alarms} of {n} requests were unusual; without a change at most {share} of them would be, on average. "
    if len(result.events) == 0:
        return text + "The stream has not drifted as far as its detectors can tell."
    first = result.events.sort_values("place").iloc[0]
    return (
        text + f"The stream has drifted: {first['statistic']} alarmed at request {int(first['place']) + 1} of it, in "
        f"{first['segment']}."
    )


def segments_table(result: MonitorResult) -> Table:
    """The drift log."""
    columns = [
        Column("segment"),
        Column("drift"),
        Column("detector", "highest detector (1 alarms)"),
        Column("statistic", "of"),
        Column("alarms", "unusual requests (at most, without a change)", "average", beside="expected_at_most"),
        Column("trajectories", "requests"),
    ]
    return Table(result.segments, "drift log", columns=columns, file="segments")


def monitor_page(result: MonitorResult) -> Page:
    """Whether the stream has drifted, which requests were unusual, and what they were compared with."""
    drift = result.found.drift.sort_values("highest", ascending=False)
    shown = result.found.stream[result.found.stream["statistic"].isin(drift["statistic"].head(_MOST_CURVES))]
    shown = shown.assign(request=shown["place"] + 1)
    alarmed = result.trajectories[result.trajectories["alarm"]].sort_values("p", kind="stable")
    nominal = min(result.options.rate * len(result.trajectories), 1.0)
    reference = len(result.profile.reference)
    stream = Section(
        "Drift of the stream",
        "Each statistic has an e-detector (Shiryaev-Roberts, from conformal p-values against the reference and all "
        "earlier requests of the stream). It is shown as a share of the value at which it alarms. False alarms come "
        f"within these {len(result.trajectories)} requests with a chance of at most {format_number(nominal, 'percent')}"
        ", over all statistics. An alarm asks for a look at the evidence, and perhaps for training again; nothing is "
        "trained by it.",
        tables=[segments_table(result), Table(result.events, "events", file="events")],
        nothing="no detector alarmed",
    )
    single = Section(
        "Unusual requests",
        "The p-value is the rank of the request's most unusual statistic among the reference's "
        f"{reference} requests that nothing was fitted to, times the number of statistics.",
        tables=[
            Table(
                alarmed[["rid", "run", "statistic", "score", "p", "rows"]],
                "unusual requests",
                formats={"score": "decimal", "p": "decimal"},
                file="trajectories",
            )
        ],
        nothing="no request was",
    )
    triage = Section(
        "Where to look first: KL by dimension",
        "**For triage, not for alarms.** The divergence is not zero without a change, and rows of one text are not "
        "independent of each other. Compare each with its floor: one half of the reference against the other, which "
        "has fewer or more rows than the runs.",
        tables=[
            Table(
                result.kl.head(MOST_DIMENSIONS),
                "KL from the reference",
                columns=[Column("dimension"), Column("kl", "KL, nats (floor)", "scientific", beside="floor")],
                file="kl",
            )
        ],
    )
    sections = [stream, single, triage]
    if result.adwin is not None:
        sections.append(
            Section(
                "ADWIN, for comparison",
                "Where the detector of Bifet and Gavaldà (2007) sees the mean of a score change. Its parameter is no "
                "rate of false alarms.",
                tables=[Table(result.adwin, "alarms of ADWIN", file="adwin")],
                nothing="it saw no change",
            )
        )
    sections.append(
        Section(
            "What is usual",
            tables=[Table(result.profile.quantiles, "rows of the reference", file="profile")],
            notes=list(result.notes),
        )
    )
    return Page(
        title="Monitor: " + ", ".join(result.names),
        answer=answer(result),
        picture=lines(
            shown,
            "request",
            "detector",
            "statistic",
            title="Evidence of drift, as a share of what alarms",
            caption="1 alarms.",
            x_label="request of the stream",
            log_y=True,
        ),
        tiles=[
            Tile("unusual requests", f"{len(alarmed)} of {len(result.trajectories)}", "p at most the share"),
            Tile("drift", f"{len(result.events)} of {len(drift)}", "statistics whose detector alarmed"),
            Tile("reference", f"{reference}", "requests that scores are ranked against"),
        ],
        sections=sections,
    )
