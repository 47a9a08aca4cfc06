"""The study in words: a paragraph and a table for a methods section or a dataset card."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from sglang_probe.report import markdown
from sglang_probe.report.numbers import format_interval, format_number
from sglang_probe.stats.intervals import LEAST_CLUSTERS
from sglang_probe.studies.coverage.result import Coverage, Map

RARE = 1e-3
"""Classes with a smaller share of the traffic are not named as the worst covered."""


Code = Callable[[object], str]
"""How a name from the workload is set apart from the words around it."""


def in_page(name: object) -> str:
    """As pages and the terminal have it, which escape every text themselves; Markdown has `markdown.code`."""
    return f"`{name}`"


def worst_class(m: Map) -> pd.Series | None:
    """The class whose share in the harvest is smallest relative to its share in traffic.

    Rare classes, and those whose interval includes equal shares, are passed over; None if no class is left.
    """
    common = m.classes[m.classes["traffic_share"] >= RARE]
    under = common[(common["log2_ratio"] < 0) & ~(common["high"] >= 0)]
    if under.empty:
        return None
    return under.sort_values(["log2_ratio", "positions"], ascending=[True, False]).iloc[0]


def worst_in_words(m: Map, code: Code = in_page) -> str:
    """A sentence that names the worst covered class."""
    worst = worst_class(m)
    if worst is None:
        return f"Along {_axes(m, code)} no class is under-represented beyond chance."
    name = _name(m, worst, code)
    if not worst["computed"]:
        return (
            f"Along {_axes(m, code)}, {name} is missing: none of its {worst['positions']:,} occurrences was computed."
        )
    interval = ""
    if not math.isnan(worst["low"]):
        interval = f" (95 % interval {2 ** worst['low']:.3g} to {2 ** worst['high']:.3g})"
    return (
        f"Along {_axes(m, code)}, {name} is under-represented most: {_percent(worst['coverage'])} of its "
        f"{worst['positions']:,} occurrences were computed, and its share of the harvest is "
        f"{2 ** worst['log2_ratio']:.3g} times its share of the traffic{interval}."
    )


def paragraph(c: Coverage, code: Code = in_page) -> str:
    """What was served, what of it was computed, and how the harvest departs from the traffic."""
    t = c.totals
    reused = f"; {t['reused']:,} were reused from the prefix cache: no forward pass was run for them"
    said = [
        f"The run {code(c.run)} served {t['requests']:,} requests with {t['positions']:,} token positions (prompts, "
        f"and outputs but for the last sampled token, which is not run). SGLang computed {t['computed']:,} of them "
        f"({_percent(t['coverage'])}){reused if t['reused'] else ''}."
    ]
    if t["dropped"]:
        said.append(f"What became of {t['dropped']:,} is not known, because facts were dropped.")
    if not math.isnan(t["contexts"]):
        share = t["context_coverage"]
        how = "all" if share == 1 else _percent(share)
        said.append(
            f"The traffic holds {int(t['contexts']):,} unique contexts (a token with its whole prefix, whatever the "
            f"cache namespace), {how} of which were computed in the run."
        )
    for m in c.maps:
        if len(m.axes) > 1 or not t["computed"]:
            continue
        said.append(worst_in_words(m, code))
        if m.bias.divergence > 0:
            said.append(
                f"The Jensen-Shannon divergence between the classes of the traffic and those of the harvest is "
                f"{m.bias.divergence:.3g} bits; with the correction weights of the classes, the {t['computed']:,} "
                f"computed positions are worth {m.bias.effective_rows:,.0f} (Kish's effective sample size)."
            )
        if m.bias.lost_share:
            said.append(f"{_percent(m.bias.lost_share)} of the traffic is in classes that no weight can restore.")
    if t["computed"]:
        said.append(
            f"Weighted by how often traffic used each of them, the computed positions are worth "
            f"{t['effective_rows']:,.0f}."
        )
    if t["families"] < LEAST_CLUSTERS:
        few = f"{t['families']:,} famil{'y is' if t['families'] == 1 else 'ies are'} too few"
        said.append(f"No intervals: {few}, {LEAST_CLUSTERS} are the least ({c.families}).")
    elif any(m.classes["low"].notna().any() for m in c.maps):
        said.append(
            f"Intervals are over {t['families']:,} families ({c.families}): Student's t on a cluster jackknife, "
            "corrected for skewness."
        )
    return " ".join(said)


def markdown_table(m: Map) -> str:
    """The classes of a map as a Markdown table."""
    head = ["positions", "computed", "coverage", "unique contexts", "share of traffic", "share of harvest"]
    rows = []
    for row in m.classes.to_dict("records"):
        contexts = "not known" if pd.isna(row["contexts"]) else f"{int(row['contexts']):,}"
        cells = [markdown.code(row[a]) for a in m.axes]
        cells += [f"{row['positions']:,}", f"{row['computed']:,}", _percent(row["coverage"]), contexts]
        rows.append([*cells, _percent(row["traffic_share"]), _percent(row["harvest_share"]), ratio_in_words(row)])
    headers = [*map(markdown.escape, m.axes), *head, "log2 ratio (95 %)"]
    return markdown.table(headers, rows, numeric=len(head) + 1)


def ratio_in_words(row: Mapping[str, Any]) -> str:
    """A class's log2 ratio with its interval."""
    if row["log2_ratio"] == -math.inf:
        return "none computed"
    ratio, interval = format_number(row["log2_ratio"], "log2"), format_interval(row["low"], row["high"], "log2")
    return ratio if math.isnan(row["low"]) else f"{ratio} {interval}"


def card_text(c: Coverage) -> str:
    """Paragraph and tables, as Markdown."""
    tables = [markdown_table(m) for m in c.maps if len(m.axes) == 1]
    notes = [f"* {markdown.escape(note)}" for note in c.notes]
    return "\n\n".join([paragraph(c, markdown.code), *tables, *notes]) + "\n"


def _axes(m: Map, code: Code) -> str:
    return " and ".join(code(a) for a in m.axes)


def _name(m: Map, row: pd.Series, code: Code) -> str:
    return " at ".join(code(row[a]) for a in m.axes)


def _percent(share: float) -> str:
    return "not known" if math.isnan(share) else format_number(share, "percent")
