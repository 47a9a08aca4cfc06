"""The report of a stability study."""

from __future__ import annotations

from sglang_probe.report.figures import Figure, dots
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.pages import only, proof
from sglang_probe.studies.sae_stability.config import ORDER, REPEAT
from sglang_probe.studies.sae_stability.study import FLOORS, SEED, StabilityResult

_IN_WORDS = {REPEAT: "the same policy, recorded again", ORDER: "the same rows, another order", SEED: "another seed"}


def answer(result: StabilityResult) -> str:
    """What was found, in a sentence."""
    frame = result.distances
    if frame.empty:
        return "Nothing was compared."
    known = frame.set_index("dictionary")
    parts = [
        f"`{name}` moves the dictionary {format_number(row['of_order'], 'decimal')} times as far as another order of "
        f"the same rows does ({format_number(row['distance'], 'decimal')})"
        for name, row in known.iterrows()
        if name not in FLOORS
    ]
    floors = [
        f"{_IN_WORDS[n]} {format_number(known.loc[n, 'distance'], 'decimal')}" for n in FLOORS if n in known.index
    ]
    return f"{'; '.join(parts)}. For comparison: {', '.join(floors)}."


def distance_table(result: StabilityResult) -> Table:
    """Distances to the reference's dictionary."""
    columns = [
        Column("dictionary"),
        Column("of_order", "of another order's", "decimal"),
        Column("distance", "distance [least, most of a seed]", "decimal", bounds=("distance_low", "distance_high")),
        Column("mcc", "mean cosine (at chance)", "decimal", beside="mcc_chance"),
        Column("mcc_encoder", "of encoders", "decimal"),
        Column("shared", "matched alike by both", "percent"),
        Column("above_0.7", "above 0.7", "percent"),
        Column("same_index", "median cosine by number", "decimal"),
    ]
    frame = result.distances
    if len(frame):
        frame = frame.assign(dictionary=[_IN_WORDS.get(n, n) for n in frame["dictionary"]])
    return Table(frame, "distance to the reference's dictionary", columns=columns, file="distances")


def _pairs(result: StabilityResult) -> Table:
    columns = [Column("dictionary"), Column("seed"), Column("distance", kind="decimal")]
    columns += [Column("mcc", "mean cosine (at chance)", "decimal", beside="mcc_chance")]
    columns += [Column("mcc_encoder", "of encoders", "decimal"), Column("shared", "matched alike by both", "percent")]
    columns += [Column("same_index", "median cosine by number", "decimal"), Column("alive_second", "that fire")]
    return Table(result.pairs, "each pair", columns=columns, long=True, file="pairs")


def coverage_table(result: StabilityResult) -> Table:
    """What each harvest has."""
    columns = [
        Column("harvest"),
        Column("segment"),
        Column("share", "has a row for", "percent"),
        Column("identical", "of these bit-identical", "percent"),
        Column("keys", "positions"),
    ]
    return Table(result.coverage, "rows of each harvest", columns=columns, file="coverage")


def stability_page(result: StabilityResult) -> Page:
    """Distances beside floors, coverage, reconstruction."""
    of, config = result.of, result.of["config"]
    more = Column("more", "more than the reference's, 95 %", "points", bounds=("more_low", "more_high"))
    fvu = [Column("axis"), Column("group"), Column("dictionary"), Column("fvu", "unexplained", "percent"), more]
    fvu += [Column("l0", "L0", "average"), Column("rows")]
    own = [Column("dictionary"), Column("fvu", "unexplained", "percent")]
    own += [Column("fvu_of_the_reference", "by the reference's dictionary", "percent"), Column("rows")]
    return Page(
        title=f"What the harvest does to the dictionary: {result.name}",
        answer=answer(result),
        picture=_picture(result),
        lead=f"{of['keys']:,} positions to train on; {of['rows_held_out']:,} of {of['families_held_out']} other "
        "families of requests to judge by. All dictionaries share initialisation and batches with the reference's, "
        "but those of another order and another seed. Only latents that fire on the rows held out are matched.",
        facts=[
            ("model", str(of["model"]["name"])),
            ("hook point", config["hook_point"]),
            ("reference", of["reference"]),
            *((k, str(config[k])) for k in ("architecture", "latents", "k", "samples", "batch_size", "seeds")),
        ],
        sections=[
            Section(
                "How far each dictionary moves",
                "Distance: one minus the mean absolute cosine of the best one-to-one matching of decoder rows. At "
                "chance: the second dictionary turned at random. With two or three seeds there is no interval: the "
                "least and the most are printed. Matched alike: decoder and encoder matchings agree.",
                tables=[distance_table(result), _pairs(result)],
            ),
            Section(
                "What each harvest holds",
                "Positions of the reference for which a harvest has a row; rows of positions that all have take the "
                "place of the others.",
                tables=[coverage_table(result)],
            ),
            Section(
                "Reconstruction of rows held out",
                "Rows of the reference's harvest, one variance for all. Intervals over families of requests.",
                figures=[_fvu(result)],
                tables=[
                    Table(result.fvu, "by kind of row", columns=fvu, long=True, file="fvu"),
                    Table(result.own, "on rows of its own harvest", columns=own, file="own"),
                ],
            ),
            proof(result.checks),
        ],
    )


def _picture(result: StabilityResult) -> Figure:
    frame = result.pairs
    if len(frame):
        frame = frame.assign(
            row=[_IN_WORDS.get(n, n) for n in frame["dictionary"]], series="seed " + frame["seed"].astype(str)
        ).drop_duplicates(["row", "series"])
        ranks = {r: i for i, r in enumerate(_IN_WORDS.values())}
        frame = frame.sort_values("row", key=lambda r: r.map(lambda x: ranks.get(x, -1)), kind="stable")
    return dots(
        frame,
        "row",
        "series",
        "distance",
        kind="decimal",
        title="Distance of each dictionary to the reference's, beside what moves it anyway",
        caption="One minus the mean cosine of the best matching of alive latents.",
        x_label="distance",
    )


def _fvu(result: StabilityResult) -> Figure:
    return dots(
        only(result.fvu, axis="segment"),
        "group",
        "dictionary",
        "fvu",
        kind="percent",
        title="Unexplained share by class of token",
        caption="Classes that a cached harvest holds few rows of are where its dictionary could be worse.",
        x_label="unexplained",
    )
