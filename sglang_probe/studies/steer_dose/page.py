"""The report of the dose study."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import Figure, lines
from sglang_probe.report.numbers import format_interval, format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.pages import facts, footer, in_points, proof
from sglang_probe.studies.steer_dose.study import SteerDoseResult

LEVEL = 0.05


def answer(result: SteerDoseResult) -> str:
    """What the registered comparisons say, in a few sentences."""
    told = []
    for row in result.registered.itertuples():
        if pd.isna(row.difference):
            told.append(f"{_first(row.comparison)}: not answered, because an arm does not reach that side effect.")
        elif pd.isna(row.low):
            told.append(f"{_first(row.comparison)}: {format_number(row.difference, 'signed')} nats, without interval.")
        else:
            ends = format_interval(row.low, row.high, "signed")
            verdict = "" if row.holm <= LEVEL else ", not told from zero (adjusted)"
            told.append(f"{_first(row.comparison)}: {format_number(row.difference, 'signed')} nats {ends}{verdict}.")
    return " ".join(told)


def registered_table(result: SteerDoseResult) -> Table:
    """The registered comparisons."""
    columns = [
        Column("comparison"),
        Column("side_effect", "side effect, nats", "decimal"),
        Column("difference", "difference of the effect, nats", "signed", bounds=("low", "high")),
        Column("p", "p", "decimal"),
        Column("holm", "p, Holm", "decimal"),
        Column("texts"),
        Column("neutral", "neutral texts"),
    ]
    return Table(result.registered, "registered comparisons", columns=columns, file="registered")


def doses_table(result: SteerDoseResult) -> Table:
    """Effect and side effects of every dose."""
    columns = [
        Column("arm"),
        Column("strength", "dose"),
        _measure("shift", "effect: log-odds of the target, nats", "signed"),
        _measure("kl", "side effect: KL on neutral texts, nats", "decimal"),
        _measure("nll", "rise of the NLL of neutral texts, nats", "signed"),
        Column("neutral_shift", "log-odds of the target in neutral texts", "signed"),
        Column("text_kl", "KL on the texts", "decimal"),
    ]
    return Table(result.doses, "every dose", columns=columns, file="doses")


def dose_page(result: SteerDoseResult) -> Page:
    """What each dose gains and costs, and which arm gains most at equal side effect."""
    c = result.config
    some = result.doses[result.doses["kl"] > 0] if len(result.doses) else result.doses
    told = facts(
        result.manifest,
        ("arms", ", ".join(c.arms)),
        ("texts", f"{result.texts}, and {result.neutral} neutral ones, {c.steps} steps each"),
        ("registered", f"{len(c.registered)} comparisons, adjusted together (Holm)"),
    )
    tiles = [
        Tile(
            row.comparison,
            format_number(row.difference, "signed"),
            "nats of log-odds" if row.holm <= LEVEL else "nats; not told from zero (adjusted)",
        )
        for row in result.registered.head(3).itertuples()
        if not pd.isna(row.difference)
    ]
    return Page(
        title=f"Dose and response: {result.name}",
        answer=answer(result),
        picture=lines(
            some,
            "kl",
            "shift",
            "arm",
            title="What each arm gains for what it costs",
            caption="A point is a dose; higher and further left is better. The axes are means over two kinds of texts.",
            x_label="KL on neutral texts, nats a token",
            y_label="log-odds of the target, nats",
            kind="signed",
            log_x=True,
        ),
        tiles=tiles,
        facts=told,
        lead="Every arm is decoded by force over the tokens of the texts, so that it differs from the plain model in "
        "nothing but the dose, or the prompt. Steering acts on generated tokens alone.",
        sections=[
            Section(
                "What was registered",
                "Written into the YAML before anything was recorded. At a level, each arm is taken where its side "
                "effect first reaches it, by straight lines between doses. Intervals are over both kinds of texts. A "
                "comparison that cannot be answered counts as not rejected.",
                tables=[registered_table(result)],
                notes=list(result.left_out),
            ),
            Section(
                "All arms at equal side effect",
                "Without p-values: these were not registered. An arm without a number does not reach the level.",
                figures=[_levels_figure(result.levels)],
                tables=[_levels_table(result)],
            ),
            Section(
                "Every dose",
                "Random vectors have the residual's covariance. A KL is no effect: they have one too.",
                tables=[doses_table(result), _vectors_table(result)],
            ),
            Section(
                "Going on by itself",
                "Differences from what the plain model writes after the same prompt; one sample a text.",
                tables=[_free_table(result)],
            ),
            *_selection(result),
            proof(result.checks),
        ],
        footer=footer(result.manifest),
    )


def _levels_figure(levels: pd.DataFrame) -> Figure:
    return lines(
        levels,
        "side_effect",
        "effect",
        "arm",
        title="Effect at equal side effect",
        caption="Bands: 95 % over texts.",
        x_label="KL on neutral texts, nats a token",
        y_label="nats",
        kind="signed",
        low="low",
        high="high",
    )


def _levels_table(result: SteerDoseResult) -> Table:
    columns = [
        Column("side_effect", "side effect, nats", "decimal"),
        Column("arm"),
        Column("effect", "effect, nats", "signed", bounds=("low", "high")),
    ]
    return Table(result.levels, "effect at equal side effect", columns=columns, file="levels")


def _vectors_table(result: SteerDoseResult) -> Table:
    columns = [
        Column("arm"),
        Column("what", "vector"),
        Column("strength", "dose"),
        Column("shift", "effect, nats", "signed"),
        Column("kl", "KL on neutral texts, nats", "decimal"),
        Column("nll", "rise of the NLL, nats", "signed"),
    ]
    return Table(result.vectors, "every vector", columns=columns, file="vectors")


def _free_table(result: SteerDoseResult) -> Table:
    columns = [
        Column("arm"),
        Column("strength", "dose"),
        _measure("target", "share of target tokens", "points"),
        Column("plain_target", "plain model", "percent"),
        _measure("distinct", "distinct-2", "points"),
        Column("plain_distinct", "plain model", "percent"),
        _measure("repeated", "repeated 8-grams", "points"),
        Column("plain_repeated", "plain model", "percent"),
    ]
    shown = in_points(result.free, "target", "distinct", "repeated")
    return Table(shown, "texts that each arm wrote", columns=columns, file="free")


def _selection(result: SteerDoseResult) -> list[Section]:
    if result.selection.empty:
        return []
    columns = [
        Column("feature"),
        Column("own", "output score, nats", "signed"),
        Column("target", "log-odds of the target, nats", "signed"),
        Column("chosen"),
    ]
    select = result.config.select
    assert select is not None
    text = (
        "Candidates are the features whose decoder rows favour the target most by the unembedding alone. Output score: "
        f"how much adding the row, {select.dose:g} mean norms, raises the log-probability of its own {select.lens} "
        f"logit-lens tokens, on {select.texts} texts that take no further part. The second number was not chosen by."
    )
    frame = result.selection.drop(columns="own_tokens")
    return [Section("Which features", text, tables=[Table(frame, "candidates", columns=columns, file="selection")])]


def _measure(name: str, header: str, kind: str) -> Column:
    return Column(name, header, kind, bounds=(f"{name}_low", f"{name}_high"))  # type: ignore[arg-type]


def _first(text: str) -> str:
    return text[:1].upper() + text[1:]
