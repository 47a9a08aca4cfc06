"""The report of a phase study."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import Figure, dots, lines
from sglang_probe.report.numbers import Kind, format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.pages import FLOOR, HOOK_POINT, deepest, facts, footer, only, proof, verdicts, with_layer
from sglang_probe.studies.phase.study import BIN, CONTRASTS, DECODED, HUMAN, REFORWARD, PhaseResult

KINDS = {HUMAN: "human text", DECODED: "decoded", REFORWARD: "prefilled again"}
_NOTHING = "no hook point was compared"


def phase_page(result: PhaseResult) -> Page:
    """The page of one study: can prefill and decode be told apart, and is it the numbers or the text?"""
    at = deepest(result.probes)
    where = at["hook_point"].iloc[0] if len(at) else "none"
    both, content, numerics = (_auc(at, c) for c in CONTRASTS)
    return Page(
        title=f"Prefill and decode: {result.name}",
        answer=f"At `{where}` a linear probe tells decoded rows from human ones with an AUC of {both}; the text alone "
        f"gives {content}, the path through the engine alone {numerics}, and 0.5 is chance."
        if len(at)
        else f"Nothing can be told apart: {_NOTHING}.",
        picture=_picture(result),
        tiles=[
            Tile("content", content, "AUC, the model's text against human text, prefilled"),
            Tile("numerics", numerics, "AUC, the same tokens decoded against prefilled"),
        ],
        lead=f"{format_number(result.texts)} texts, each a prompt and a continuation, whose "
        f"{format_number(result.positions)} positions were computed three times: as human text prefilled, as the "
        "model's own text decoded, and as that text prefilled again.",
        facts=facts(result.manifest),
        sections=[_probes(result), _numerics(result), _moments(result), proof(result.checks)],
        footer=footer(result.manifest),
    )


def _auc(at: pd.DataFrame, contrast: str) -> str:
    found = only(at, contrast=contrast)
    return format_number(found["auc"].iloc[0] if len(found) else None, "decimal")


def _picture(result: PhaseResult) -> Figure:
    title = "Area under the curve (AUC) of a linear probe on unseen texts"
    if len(layers := with_layer(result.probes)):
        return lines(
            layers,
            "layer",
            "auc",
            "contrast",
            low="low",
            high="high",
            kind="decimal",
            title=f"{title}, by layer of `{layers['site'].iloc[0]}`",
            caption="0.5 is chance. Bands are 95 % intervals over texts. Other hook points are in the table.",
            x_label="layer",
            y_label="AUC",
        )
    chance = pd.DataFrame({"name": ["chance"], "value": [0.5]})
    return dots(
        result.probes,
        "hook_point",
        "contrast",
        "auc",
        low="low",
        high="high",
        kind="decimal",
        references=chance,
        zero=False,
        title=title,
        caption="Lines are 95 % intervals over texts.",
        x_label="AUC",
    )


def probes_table(result: PhaseResult) -> Table:
    """AUC of the linear probes with its interval and its null."""
    columns = [
        Column("contrast"),
        HOOK_POINT,
        Column("auc", "AUC, 95 % interval", "decimal", bounds=("low", "high")),
        Column(header="with exchanged labels, 95 %", kind="decimal", bounds=("null_low", "null_high")),
        Column("p", kind="decimal"),
    ]
    return Table(
        result.probes, "Linear probe on unseen texts", columns=columns, long=len(result.probes) > 30, file="probes"
    )


def numerics_table(result: PhaseResult) -> Table:
    """Effect beside floor of decoding what could be prefilled."""
    title = "Decoded against prefilled again, mean relative L2"
    return Table(result.numerics, title, columns=verdicts(HOOK_POINT), long=len(result.numerics) > 30, file="numerics")


def moments_table(result: PhaseResult) -> Table:
    """Norm, mean, variance, kurtosis and outliers of each kind of row."""
    columns = [
        HOOK_POINT,
        Column("kind"),
        Column("norm"),
        Column("outliers", "outliers, 95 % interval", "percent", bounds=("outliers_low", "outliers_high")),
        Column("mean"),
        Column("variance"),
        Column("kurtosis"),
    ]
    title = f"Rows of {result.positions:,} continuation positions of {result.texts} texts"
    return Table(_kinds_named(result.moments), title, columns=columns, long=len(result.moments) > 30, file="moments")


def _kinds_named(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(kind=frame["kind"].map(lambda k: KINDS.get(k, k))) if len(frame) else frame


def _probes(result: PhaseResult) -> Section:
    return Section(
        heading="Can they be told apart?",
        text="A linear discriminant, found on some texts and tried on others. 0.5 is chance. **Content** compares the "
        "model's own text with human text, both prefilled. **Numerics** compares the same tokens at the same "
        "positions, decoded and prefilled. The interval is over texts; the null exchanges labels within texts, 99 "
        "times, and p is the share that reaches the AUC, which counts itself.",
        tables=[probes_table(result)],
        nothing=_NOTHING,
    )


def _numerics(result: PhaseResult) -> Section:
    return Section(
        heading="Numerics: the same tokens, decoded and prefilled",
        text=f"Relative L2 of each row. {FLOOR}",
        figures=_numerics_by_layer(result),
        tables=[numerics_table(result)],
        nothing=_NOTHING,
    )


def _numerics_by_layer(result: PhaseResult) -> list[Figure]:
    """Effect and floor on an axis of layers, where there are many."""
    frame = with_layer(result.numerics)
    if frame.empty:
        return []
    both = [frame[["layer"]].assign(what=what, l2=frame[what]) for what in ("effect", "floor")]
    return [
        lines(
            pd.concat(both, ignore_index=True),
            "layer",
            "l2",
            "what",
            kind="scientific",
            title=f"Decoded against prefilled again, by layer of `{frame['site'].iloc[0]}`",
            x_label="layer",
            y_label="mean relative L2",
        )
    ]


def _moments(result: PhaseResult) -> Section:
    frame = _kinds_named(deepest(result.by_position))
    where = frame["hook_point"].iloc[0] if len(frame) else "rows"
    shown: tuple[tuple[str, Kind, str], ...] = (
        ("norm", "auto", "Mean norm of the rows."),
        ("outliers", "percent", "Share of entries outside the central 99.9 % of human rows of other texts."),
    )
    curves = [
        lines(
            frame,
            "start",
            column,
            "kind",
            low=f"{column}_low",
            high=f"{column}_high",
            title=f"`{where}`: {column} by position",
            x_label=f"position after the prompt (start of bin of {BIN})",
            y_label=column,
            kind=kind,
            caption=caption,
        )
        for column, kind, caption in shown
    ]
    return Section(
        heading="What the rows look like",
        text="`mean` is the root mean square of the mean row, `variance` the mean over dimensions, `kurtosis` the "
        "median excess kurtosis over dimensions, `outliers` the share of entries outside the central 99.9 % of the "
        "human rows of other texts, dimension by dimension.",
        figures=curves,
        tables=[moments_table(result)],
        nothing=_NOTHING,
    )
