"""The report of an overlap."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import Figure, dots
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.sae_overlap.study import DISCOVERED, OverlapResult

_NULLS = [
    Column("value", kind="decimal"),
    Column("p", kind="decimal"),
    Column("swapped", "regimes exchanged within texts (5 %)", "decimal", beside="swapped_low"),
    Column("across", "half of one against half of the other", "decimal"),
    Column("halves", "two halves of the first", "decimal"),
]


def answer(result: OverlapResult) -> str:
    """What was found, in a sentence."""
    first, second = result.names
    parts = []
    if len(result.numerics) and "jaccard" in result.numerics:
        row = result.numerics.iloc[0]
        parts.append(
            f"on {int(row['rows']):,} rows of the same tokens the same features fire in "
            f"{format_number(row['identical'], 'percent')} (Jaccard {format_number(row['jaccard'], 'decimal')})"
        )
    changed, turned = (discovered(f) for f in (result.drift, result.turned))
    parts.append(f"{changed:,} of {len(result.drift):,} features fire at another rate")
    parts.append(f"{turned:,} of {len(result.turned):,} stand for another direction (5 % of either may be false)")
    return f"Between `{first}` and `{second}`, {result.rows:,} rows of {result.texts:,} texts: {'; '.join(parts)}."


def discovered(frame: pd.DataFrame) -> int:
    """Features of a table that are singled out."""
    return int((frame["q"] <= DISCOVERED).sum()) if "q" in frame else 0


def numerics_table(result: OverlapResult) -> Table:
    """The same tokens, computed twice."""
    columns = [
        Column("rows"),
        Column("jaccard", "Jaccard of active features, 95 %", "decimal", bounds=("jaccard_low", "jaccard_high")),
        Column("identical", "rows with the same active features", "percent"),
    ]
    return Table(result.numerics, "the same tokens, computed twice", columns=columns, file="numerics")


def sets_table(result: OverlapResult) -> Table:
    """Sets and ranks of features, with nulls."""
    return Table(result.sets, "features in common", columns=[Column("statistic"), *_NULLS], file="sets")


def turn_table(result: OverlapResult) -> Table:
    """Cosines of effective directions, with nulls."""
    renamed = result.rotated.rename(columns={"exchanged": "swapped", "exchanged_low": "swapped_low"})
    shown = renamed.assign(statistic=[_QUANTILES.get(s, s) for s in renamed.get("statistic", [])])
    return Table(shown, "cosine of effective directions", columns=[Column("statistic"), *_NULLS], file="rotated")


_QUANTILES = {"median": "median feature", "low": "5 % quantile of features"}


def splits_table(result: OverlapResult) -> Table:
    """Splits and merges, beside those of seeds."""
    columns = [
        Column("dictionary"),
        Column("splits", "features split (of)", "integer", beside="latents"),
        Column("merges", "features merged (of)", "integer", beside="other_latents"),
    ]
    return Table(result.splits, "split and merged", columns=columns, file="splits")


def overlap_page(result: OverlapResult) -> Page:
    """Numerics, rates, sets, directions, splits."""
    changed, turned = (discovered(f) for f in (result.drift, result.turned))
    first, second = result.names
    names = {"rate_first": f"rate in {first}", "rate_second": f"rate in {second}"}
    rates = [Column("latent"), Column("log2", "log2 of the ratio", "log2")]
    rates += [Column(n, header, "percent") for n, header in names.items()]
    rates += [Column("q", "q, Benjamini-Hochberg", "decimal")]
    turns = [Column("latent"), Column("cosine", kind="decimal"), Column("exchanged", "exchanged", "decimal")]
    turns += [Column("firings"), Column("q", "q, Benjamini-Hochberg", "decimal")]
    active = [Column("regime"), Column("mean", kind="average", bounds=("mean_low", "mean_high"))]
    active += [Column(n, h, "average") for n, h in (("low", "5 %"), ("median", "median"), ("high", "95 %"))]
    return Page(
        title=f"Features of two regimes: {first} and {second}",
        answer=answer(result),
        picture=_picture(result),
        lead="Rows are of the same requests and positions in both; attention sinks and rows under interventions are in "
        "neither. No value here means anything without those beside it: sets of common features and directions "
        "measured on few rows differ between halves of one regime as well.",
        tiles=[
            Tile("another rate", f"{changed:,} of {len(result.drift):,}", "features, false discovery rate 5 %"),
            Tile("another direction", f"{turned:,} of {len(result.turned):,}", "features, false discovery rate 5 %"),
            Tile("same tokens", f"{result.same_tokens:,} of {result.rows:,}", "rows"),
        ],
        facts=[("dictionary", f"{result.sae}, weights {result.weights[:16]}"), ("hook point", result.hook_point)],
        sections=[
            Section(
                "Numerics",
                "Rows of the same tokens after the same tokens, computed in both runs: what differs is arithmetic.",
                tables=[numerics_table(result)],
                nothing="the runs have no rows of the same tokens",
            ),
            Section(
                "Features in common",
                "The commonest features of one regime that are among the commonest of the other (Jaccard), and the "
                "rank correlation of all rates. `p`: a value as low with the regimes exchanged within texts.",
                tables=[sets_table(result), Table(result.active, "active features of a row", columns=active)],
            ),
            Section(
                "Rates",
                "Paired differences of rates by text, of features with a rate of 0.2 % in either regime.",
                tables=[
                    Table(_sorted(result.drift), "by feature", columns=rates, long=True, file="drift"),
                ],
                nothing="no feature fires often enough",
            ),
            Section(
                "Directions",
                "The mean part of a row that a feature answers for, what the dictionary leaves over included, where it "
                "fires; of every text as many firings in either regime.",
                tables=[
                    turn_table(result),
                    Table(_sorted(result.turned), "by feature", columns=turns, long=True, file="turned"),
                ],
                nothing="no feature fires in enough rows of both regimes",
            ),
            Section(
                "Split and merged",
                "A feature is split if two or more of the other dictionary point its way, together cover its rows, and "
                "none does alone. Seeds of one regime alone do that too.",
                tables=[splits_table(result)],
                nothing="no other dictionary was given (`--other`, `--floor`)",
            ),
        ],
    )


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values("p") if "p" in frame else frame


def _picture(result: OverlapResult) -> Figure:
    turned = result.rotated
    if len(turned):
        turned = turned.assign(statistic="cosine: " + turned["statistic"].map(lambda s: _QUANTILES.get(s, s)))
    parts = [result.sets, turned]
    frame = pd.concat(parts, ignore_index=True)
    names = {"value": "measured", "across": "half of either", "halves": "halves of the first"}
    there = [n for n in names if n in frame]
    long = frame
    if there:
        long = frame.melt("statistic", there, "which", "shown")
        long = long.assign(which=long["which"].map(names))
    return dots(
        long,
        "statistic",
        "which",
        "shown",
        kind="decimal",
        title="Agreement of the two regimes, and of halves of one",
        caption="Compare halves with halves: they have as many rows. The measured value has twice as many.",
        x_label="agreement",
    )
