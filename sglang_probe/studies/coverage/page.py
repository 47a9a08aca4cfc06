"""The report of a coverage study of one run or several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sglang_probe.report.figures import Figure, dots, grouped_bars, heatmap
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.stats.intervals import LEAST_CLUSTERS
from sglang_probe.studies.coverage.result import Coverage, Map
from sglang_probe.studies.coverage.words import paragraph, ratio_in_words, worst_in_words

_COVERAGE = Column("coverage", kind="percent")
_COUNTS = [Column("positions"), Column("computed"), Column("reused")]
_RARE = [Column("dropped"), Column("unrequested")]
_CONTEXTS = [Column("contexts", "unique contexts"), Column("context_coverage", "of them computed", "percent")]
_SHARES = [
    Column("harvest_share", "share of harvest", "percent"),
    Column("traffic_share", "share of traffic", "percent"),
]


_MOST_ROWS = 30
"""Longer tables are folded away."""


def coverage_page(studies: Sequence[Coverage]) -> Page:
    """The page: what each run computed of its traffic, class by class, and how the harvest departs from it."""
    first = studies[0]
    names = [m.name for m in first.maps if all(m.name in [o.name for o in c.maps] for c in studies)]
    singles = [n for n in names if len(first.map(n).axes) == 1]
    crossed = [n for n in names if len(first.map(n).axes) == 2]
    return Page(
        title="What the harvest holds of its traffic: " + ", ".join(c.run for c in studies),
        answer=_answer(studies),
        picture=_coverage_of(studies, singles[0]) if singles else None,
        lead="\n\n".join(_lead(c) for c in studies if len(studies) > 1),
        tiles=_tiles(first) if len(studies) == 1 else [],
        sections=[
            *([_totals(studies)] if len(studies) > 1 else []),
            *(_axis(studies, name, pictured=i == 0) for i, name in enumerate(singles)),
            *(_crossed(studies, name) for name in crossed),
            _methods(studies),
        ],
        footer="Coverage is the computed share of occurrences in traffic. A reused position has a key and a value from "
        "another request's forward pass, and no activation of its own.",
    )


def _answer(studies: Sequence[Coverage]) -> str:
    """Of the run that computed least of its traffic."""
    counted = [c for c in studies if c.totals["positions"]]
    return _lead(min(counted, key=lambda c: c.totals["coverage"])) if counted else "No position was recorded."


def _lead(c: Coverage) -> str:
    t = c.totals
    positions = format_number(int(t["positions"]))
    head = f"`{c.run}`: {format_number(t['coverage'], 'percent')} of {positions} positions computed."
    return " ".join([head, *(worst_in_words(m) for m in c.maps[:1] if t["computed"])])


def _tiles(c: Coverage) -> list[Tile]:
    t = c.totals
    contexts = "not known"
    if not np.isnan(t["contexts"]):
        contexts = format_number(t["context_coverage"], "percent")
    return [
        Tile(
            "computed",
            format_number(t["coverage"], "percent"),
            f"of {format_number(int(t['positions']))} positions; {format_number(int(t['reused']))} were reused",
        ),
        Tile("unique contexts", contexts, "computed in the run, of the tokens with their whole prefix in traffic"),
        *(
            Tile(
                "bias",
                f"{format_number(m.bias.divergence, 'decimal')} bits" if t["computed"] else "not known",
                f"Jensen-Shannon divergence of harvest and traffic along `{m.name}`",
            )
            for m in c.maps[:1]
        ),
        Tile(
            "effective rows",
            format_number(int(t["effective_rows"])),
            f"of {format_number(int(t['computed']))} computed positions, each weighted by its use in traffic",
        ),
    ]


def _totals(studies: Sequence[Coverage]) -> Section:
    frame = pd.DataFrame([{"run": c.run, **c.totals} for c in studies])
    effective = Column("effective_rows", kind="rate")
    columns = [Column("run"), _COVERAGE, *_COUNTS, effective, *_CONTEXTS, *_present(frame, _RARE), Column("requests")]
    return Section("Runs", tables=[Table(frame, "Positions of each run", columns=columns)])


def class_table(c: Coverage, m: Map) -> Table:
    """Classes of one axis: coverage, and the bias of the harvest against the traffic."""
    frame = m.classes.assign(ratio=[ratio_in_words(row) for row in m.classes.to_dict("records")])
    columns = [Column(a) for a in m.axes]
    columns += [_COVERAGE, Column("ratio", "log2 share ratio, 95 %"), *_SHARES, *_COUNTS[:2]]
    return Table(frame, f"{c.run}: coverage by {m.name}", columns=columns)


def _coverage_of(studies: Sequence[Coverage], name: str) -> Figure:
    return grouped_bars(
        _together(studies, name),
        name,
        "run",
        "coverage",
        title=f"Coverage by {name}",
        kind="percent",
        caption="Share of occurrences in traffic whose forward pass was run.",
    )


def _axis(studies: Sequence[Coverage], name: str, *, pictured: bool) -> Section:
    """Args: pictured: whether the figure of coverage is at the head of the page."""
    frame = _together(studies, name)
    finite = frame.assign(**{k: frame[k].where(np.isfinite(frame[k])) for k in ("log2_ratio", "low", "high")})
    ratios = finite[finite["log2_ratio"].notna()]
    figures = [] if pictured else [_coverage_of(studies, name)]
    if len(ratios):
        figures.append(
            dots(
                ratios,
                name,
                "run",
                "log2_ratio",
                low="low",
                high="high",
                kind="log2",
                references=pd.DataFrame({"name": ["as in traffic"], "value": [0.0]}),
                title=f"Bias by {name}: log2 of share in the harvest over share in traffic",
                caption="-1: half as frequent in the harvest as in traffic. Lines are 95 % intervals over prefix "
                f"families, where at least {LEAST_CLUSTERS} have the class.",
                x_label="log2 of the ratio of shares",
            )
        )
    figures += [_multiplicity(c, name) for c in studies if c.totals["reused"] and c.totals["computed"]]
    tables = [t for c in studies for t in _tables(c, name)]
    facts = [
        f"`{c.run}`: divergence {format_number(c.map(name).bias.divergence, 'decimal')} bits, "
        f"{format_number(int(c.map(name).bias.effective_rows))} effective rows under the correction weights. "
        + worst_in_words(c.map(name))
        for c in studies
    ]
    return Section(heading=f"By {name}", text="\n\n".join(facts), figures=figures, tables=tables)


def _multiplicity(c: Coverage, name: str) -> Figure:
    frame = c.map(name).multiplicity
    share = frame["rows"] / frame.groupby(name, observed=True)["rows"].transform("sum")
    return heatmap(
        frame.assign(share=share),
        name,
        "multiplicity",
        "share",
        title=f"{c.run}: occurrences that one computed position stands for",
        column_label="occurrences in traffic",
        missing="none",
        caption="Share of the class's computed positions. 1 is a position that nothing reused.",
    )


def _crossed(studies: Sequence[Coverage], name: str) -> Section:
    first, second = studies[0].map(name).axes
    figures = [
        heatmap(
            _ordered(c.map(name).classes, second),
            first,
            second,
            "coverage",
            title=f"{c.run}: coverage by {first} and {second}",
            column_label=second,
            caption="Computed share of the occurrences, in percent.",
        )
        for c in studies
    ]
    text = " ".join(f"`{c.run}`: {worst_in_words(c.map(name))}" for c in studies if c.totals["computed"])
    return Section(heading=f"By {first} and {second}", text=text, figures=figures)


def _methods(studies: Sequence[Coverage]) -> Section:
    text = "\n\n".join(paragraph(c) for c in studies)
    notes = [f"`{c.run}`: {note}" for c in studies for note in c.notes]
    notes += [f"`{c.run}`: axis `{a}` was left out: {why}." for c in studies for a, why in c.missing_axes.items()]
    return Section("For a methods section or a dataset card", text=text, notes=notes)


def _together(studies: Sequence[Coverage], name: str) -> pd.DataFrame:
    frames = [c.map(name).classes.astype({name: str}).assign(run=c.run) for c in studies]
    return pd.concat(frames, ignore_index=True)


def _tables(c: Coverage, name: str) -> list[Table]:
    frame = c.map(name).classes
    ratio = Column("log2_ratio", "log2 share ratio, 95 %", "log2", bounds=("low", "high"))
    weight = Column("weight", "correction weight", "decimal")
    long, file = len(frame) > _MOST_ROWS, f"classes-{name}"
    counts = [Column(name), _COVERAGE, *_COUNTS, *_present(frame, _RARE), *_CONTEXTS]
    return [
        Table(
            frame,
            f"{c.run}: bias by {name}, and the correction weight",
            columns=[Column(name), ratio, *_SHARES, weight],
            long=long,
            file=file,
        ),
        Table(frame, f"{c.run}: counts by {name}", columns=counts, long=long, file=file),
    ]


def _present(frame: pd.DataFrame, columns: Sequence[Column]) -> list[Column]:
    """Those that are not zero throughout."""
    return [c for c in columns if frame[c.name].any()]


def _ordered(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Rows in the order of the column's categories, so that the columns of the figure are."""
    return frame.sort_values(column, kind="stable")
