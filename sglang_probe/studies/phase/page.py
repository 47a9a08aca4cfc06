"""The report of a phase study."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import grouped_bars, lines
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Kind, Table, format_number
from sglang_probe.run.hook_points import EMBED
from sglang_probe.studies.phase.study import PhaseResult


def phase_page(result: PhaseResult) -> Page:
    """The page of one study: can prefill and decode be told apart, and is it the numbers or the text?"""
    m = result.manifest
    v = m["versions"]
    deepest = result.probes["hook_point"].iloc[-1]
    at = result.probes[result.probes["hook_point"] == deepest].set_index("contrast")
    lead = (
        f"{result.texts} texts, each a prompt and a continuation, whose {format_number(result.positions)} positions "
        "were computed three times: as human text prefilled, as the model's own text decoded, and as that prefilled "
        f"again. At `{deepest}` a linear probe tells decoded rows from human ones with an AUC of "
        f"{at.loc['numerics and content', 'auc']:.3f}; the text alone gives {at.loc['content', 'auc']:.3f}, the path "
        f"through the engine alone {at.loc['numerics', 'auc']:.3f}."
    )
    return Page(
        title=f"Prefill and decode: {result.name}",
        lead=lead,
        tiles=[
            Tile("content", f"{at.loc['content', 'auc']:.3f}", "AUC, the model's text against human text, prefilled"),
            Tile("numerics", f"{at.loc['numerics', 'auc']:.3f}", "AUC, the same tokens decoded against prefilled"),
        ],
        facts=[
            ("model", f"{m['model']['name']} ({m['model']['architecture']}, {m['model']['layers']} layers)"),
            ("engine", f"SGLang {v['sglang']}, torch {v['torch']}"),
            ("rows in", str(m["rows_dtype"])),
            ("recorded", m["created"]),
        ],
        sections=[_probes(result), _numerics(result), _moments(result), _proof(result)],
        footer=f"sglang-probe {v['sglang-probe']}. Every number was measured in the runs listed here.",
    )


def _probes(result: PhaseResult) -> Section:
    numbers: dict[str, Kind] = {}
    return Section(
        heading="Can they be told apart?",
        text="A linear discriminant, found on some texts and tried on others. 0.5 is chance. *Content* compares the "
        "model's own text with human text, both prefilled. *Numerics* compares the same tokens at the same positions, "
        "decoded and prefilled. The interval draws texts with replacement; the null exchanges labels within texts.",
        figures=[
            grouped_bars(
                result.probes,
                "hook_point",
                "contrast",
                "auc",
                low="low",
                high="high",
                title="AUC of a linear probe on unseen texts",
                caption="With 95 % intervals over texts.",
            )
        ],
        tables=[Table(result.probes, "Probes", numbers)],
    )


def _numerics(result: PhaseResult) -> Section:
    columns = ["hook_point", "positions", "identical_effect", "identical_floor", "effect", "floor", "excess_low"]
    columns += ["excess_high", "q", "verdict"]
    kinds: dict[str, Kind] = dict.fromkeys(["effect", "floor", "excess_low", "excess_high"], "scientific")
    kinds |= {"identical_effect": "percent", "identical_floor": "percent"}
    return Section(
        heading="Numerics: the same tokens, decoded and prefilled",
        text="Relative L2 of each row, beside the floor: the same run again in another order.",
        tables=[Table(result.numerics[columns], "Effect beside floor", kinds)],
    )


def _moments(result: PhaseResult) -> Section:
    deep = [h for h in dict.fromkeys(result.moments["hook_point"]) if h != EMBED]
    frame = result.by_position[result.by_position["hook_point"] == (deep[-1] if deep else EMBED)]
    kinds: dict[str, Kind] = {"outliers": "percent", "outliers_low": "percent", "outliers_high": "percent"}
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
            x_label="position behind the prompt (start of bin of 32)",
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
        tables=[Table(result.moments, "Moments", kinds)],
    )


def _proof(result: PhaseResult) -> Section:
    rows = [
        {"run": n, "check": c.name, "covered": f"{c.covered:,} {c.unit}", "result": c.violation or "holds"}
        for n, checks in result.checks.items()
        for c in checks
    ]
    return Section(
        heading="Why to believe it",
        text="The invariants of the ledger, checked on the files of each run.",
        tables=[Table(pd.DataFrame(rows), "Checks")],
    )
