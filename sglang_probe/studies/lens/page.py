"""The report of a lens."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import Figure, lines, token_map
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.lens.study import EMBEDDING, LensResult
from sglang_probe.studies.pages import only


def layer_name(layer: int) -> str:
    """As a table has it."""
    return "embed" if layer == EMBEDDING else str(layer)


def answer(result: LensResult) -> str:
    """What was found, in a sentence."""
    positions = len(result.readings[["rid", "position"]].drop_duplicates())
    shown = only(result.layers, phase="all")
    if result.final is None:
        best = shown.iloc[-1]
        return (
            f"After layer {layer_name(int(best['layer']))}, {result.target} has a median rank of "
            f"{format_number(best['rank'])} at {positions:,} positions."
        )
    half = result.settling[result.settling["share_so_far"] >= 0.5]
    where = layer_name(int(half["layer"].iloc[0])) if len(half) else "the last"
    return (
        f"At half of {positions:,} positions the most likely token is the final one from layer {where} on "
        f"(the last is {result.final})."
    )


def layer_table(result: LensResult) -> Table:
    """A row for each layer."""
    frame = only(result.layers, phase="all")
    columns = [
        Column("name", "layer", "text"),
        Column("agreement", "final token is the likeliest", "percent"),
        *(
            [Column("kl", "KL(final ‖ layer), nats", "decimal")]
            if result.tuned is None
            else [Column("kl", "KL(final ‖ layer), nats, tuned (plain)", "decimal", beside="plain_kl")]
        ),
        Column("entropy", "entropy, nats", "decimal"),
        Column("rank", "median rank of target (of another position's)", beside="other_rank"),
        Column("log_likelihood", "log-likelihood of target", "signed"),
    ]
    return Table(
        frame.assign(name=frame["layer"].map(layer_name)), "by layer, all positions", columns=columns, file="layers"
    )


def lens_page(result: LensResult) -> Page:
    """The map, and what the layers say on average."""
    by_phase = only(result.layers, phase=[p for p in result.layers["phase"].unique() if p != "all"])
    tiles = []
    tuned = [] if result.tuned is None else [("tuned lens", result.tuned)]
    if result.final is not None:
        last = only(result.layers, phase="all").set_index("layer").loc[result.final]
        tiles = [
            Tile("final entropy", f"{format_number(last['entropy'], 'decimal')} nats", "of the next token"),
            Tile("median rank", format_number(last["rank"]), f"of {result.target}, after the last layer"),
        ]
    return Page(
        title=f"{'Logit' if result.tuned is None else 'Tuned'} lens: {result.run}",
        answer=answer(result),
        picture=_map(result),
        tiles=tiles,
        facts=[("model", result.model), ("target", result.target), ("request shown", result.shown), *tuned],
        sections=[
            Section("By layer", figures=_curves(by_phase, result), tables=[layer_table(result)]),
            Section(
                "Over positions",
                "The same by where the position is in its request.",
                figures=[_over_positions(result, "kl", "KL(final ‖ layer) by position", "nats")],
                tables=[Table(result.bands, "by layer and position", long=True, file="positions")],
                nothing="the last layer was not captured",
            ),
            Section("How to read it", notes=list(result.notes)),
        ],
        footer="Lens: final norm and unembedding of the checkpoint, in float32, on recorded rows. The rank beside the "
        "target's is that of the token that came after another position: what a rank owes to frequent tokens.",
    )


def _map(result: LensResult) -> Figure:
    frame = result.map.sort_values(["layer", "position"], ascending=[False, True])
    frame = frame.assign(
        layer_name=frame["layer"].map(layer_name),
        hit=frame["top_text"].eq(frame["next"]),
        said=[_cell(r) for r in frame.to_dict("records")],
    ).rename(columns={"layer_name": "after_layer"})
    heads = result.map.drop_duplicates("position").sort_values("position")["token"].tolist()
    gathered = int(result.map.drop_duplicates("position")["row"].eq("gathered").sum())
    caption = f"Request `{result.shown}`. Each column is a position and the token there; each cell the token that is "
    caption += (
        "most likely to come next by what is there after a layer, shaded by its probability, underlined where it "
    )
    caption += f"is the target ({result.target}). "
    caption += f"Rows of {gathered} positions were gathered from the requests that computed them." * bool(gathered)
    return token_map(
        frame,
        "after_layer",
        "position",
        "top_text",
        "top_probability",
        title="The most likely next token by layer and position",
        caption=caption,
        heads=heads,
        marked="hit",
        tip="said",
    )


def _cell(r: dict[str, object]) -> str:
    parts = [f"layer {layer_name(int(str(r['layer'])))}, position {r['position']} ({r['row']})"]
    parts.append(f"{r['top_text']!r} {format_number(r['top_probability'], 'percent')}")
    parts.append(f"entropy {format_number(r['entropy'], 'decimal')}")
    if pd.notna(r["kl"]):
        parts.append(f"KL {format_number(r['kl'], 'decimal')}")
    if pd.notna(r["rank"]):
        parts.append(f"rank of {r['next']!r}: {format_number(r['rank'])}")
    return "; ".join(parts)


def _curves(by_phase: pd.DataFrame, result: LensResult) -> list[Figure]:
    given = {"agreement": ("Final token is the likeliest", "percent"), "entropy": ("Entropy, nats", "decimal")}
    figures = [
        lines(by_phase, "layer", name, "phase", title=title, x_label="layer", kind=kind)  # type: ignore[arg-type]
        for name, (title, kind) in given.items()
        if by_phase[name].notna().any()
    ]
    both = pd.concat(
        [
            only(result.layers, phase="all")[["layer", name]].rename(columns={name: "value"}).assign(of=words)
            for name, words in (("rank", "target"), ("other_rank", "target of another position"))
        ]
    )
    if both["value"].notna().any():
        title, caption = "Median rank of the target", "Rank 1 is the most likely token."
        figures.append(lines(both, "layer", "value", "of", title=title, caption=caption, x_label="layer", log_y=True))
    return figures


def _over_positions(result: LensResult, name: str, title: str, label: str) -> Figure:
    frame = result.bands
    return lines(frame, "layer", name, "positions", title=title, x_label="layer", y_label=label, kind="decimal")
