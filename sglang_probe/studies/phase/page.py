"""The report of a phase study."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import grouped_bars, lines
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Kind, Table, format_number
from sglang_probe.run.hook_points import EMBED
from sglang_probe.studies.pages import FLOOR, HOOK_POINT, facts, footer, proof, verdicts
from sglang_probe.studies.phase.study import BIN, PhaseResult


def phase_page(result: PhaseResult) -> Page:
    """The page of one study: can prefill and decode be told apart, and is it the numbers or the text?"""
    deepest = result.probes["hook_point"].iloc[-1]
    auc = result.probes[result.probes["hook_point"] == deepest].set_index("contrast")["auc"]
    both, content, numerics = (f"{auc[c]:.3f}" for c in ("numerics and content", "content", "numerics"))
    return Page(
        title=f"Prefill and decode: {result.name}",
        lead=f"{result.texts} texts, each a prompt and a continuation, whose {format_number(result.positions)} "
        "positions were computed three times: as human text prefilled, as the model's own text decoded, and as that "
        f"text prefilled again. At `{deepest}` a linear probe tells decoded rows from human ones with an AUC of "
        f"{both}; the text alone gives {content}, the path through the engine alone {numerics}.",
        tiles=[
            Tile("content", content, "AUC, the model's text against human text, prefilled"),
            Tile("numerics", numerics, "AUC, the same tokens decoded against prefilled"),
        ],
        facts=facts(result.manifest),
        sections=[_probes(result), _numerics(result), _moments(result), proof(result.checks)],
        footer=footer(result.manifest),
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
    return Table(result.probes, "Linear probe on unseen texts", columns=columns)


def numerics_table(result: PhaseResult) -> Table:
    """Effect beside floor of decoding what could be prefilled."""
    title = "Decoded against prefilled again, mean relative L2"
    return Table(result.numerics, title, columns=verdicts(HOOK_POINT))


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
    return Table(result.moments, title, columns=columns)


def _probes(result: PhaseResult) -> Section:
    return Section(
        heading="Can they be told apart?",
        text="A linear discriminant, found on some texts and tried on others. 0.5 is chance. **Content** compares the "
        "model's own text with human text, both prefilled. **Numerics** compares the same tokens at the same "
        "positions, decoded and prefilled. The interval is over texts; the null exchanges labels within texts, 99 "
        "times, and p is the share that reaches the AUC, which counts itself.",
        figures=[
            grouped_bars(
                result.probes,
                "hook_point",
                "contrast",
                "auc",
                low="low",
                high="high",
                kind="decimal",
                title="AUC of a linear probe on unseen texts",
                caption="With 95 % intervals over texts.",
            )
        ],
        tables=[probes_table(result)],
    )


def _numerics(result: PhaseResult) -> Section:
    return Section(
        heading="Numerics: the same tokens, decoded and prefilled",
        text=f"Relative L2 of each row. {FLOOR}",
        tables=[numerics_table(result)],
    )


def _moments(result: PhaseResult) -> Section:
    deep = [h for h in dict.fromkeys(result.moments["hook_point"]) if h != EMBED]
    frame = result.by_position[result.by_position["hook_point"] == (deep[-1] if deep else EMBED)]
    shown: tuple[tuple[str, Kind, str], ...] = (
        ("norm", "auto", "Mean norm of the rows."),
        ("outliers", "percent", "Entries outside the central 99.9 % of human rows of other texts."),
    )
    curves = [
        lines(
            pd.DataFrame(frame),
            "start",
            column,
            "kind",
            low=f"{column}_low",
            high=f"{column}_high",
            title=f"{frame['hook_point'].iloc[0]}: {column} by position",
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
    )
