"""The report of the features: what their labels are worth. The cards are in the dashboard."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sglang_probe.report.figures import dots
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.features.arms import OWN
from sglang_probe.studies.features.dashboard import DASHBOARD
from sglang_probe.studies.features.study import FeaturesResult

_WORTH = (
    "Labels are the token-set rule (*heuristic*, no model): the at most ten tokens on which a latent fires, found on "
    "half of the texts and judged on the other half. Detection: is this a window in which it fires? Fuzzing: are the "
    "marked tokens those on which it fires? 0.5 is chance. A label is worth what it has beyond the labels of other "
    "latents, and a dictionary what it has beyond random directions that fire as often, and beyond the dictionary of "
    "a model that was not trained (`sglang-probe model randomise`)."
).replace("*", "")


def answer(result: FeaturesResult) -> str:
    """What was found, in a sentence."""
    alive = result.latents[result.latents["rate"] > 0]
    named = int((alive["f1"] >= 0.5).sum())
    s = result.scores.iloc[0]
    return (
        f"For {named:,} of {len(alive):,} latents that fire, at most ten tokens say where (F1 of 0.5 or more). Their "
        f"labels detect them with {format_number(s['labels'], 'percent')}, labels of other latents with "
        f"{format_number(s['other_latents'], 'percent')}, those of random directions with "
        f"{format_number(s['random_directions'], 'percent')}{_random_model(s)}."
    )


def _random_model(s: pd.Series[Any]) -> str:
    if pd.isna(s["random_model"]):
        return ""
    return f", those of a model that was not trained with {format_number(s['random_model'], 'percent')}"


def score_table(result: FeaturesResult) -> Table:
    """Scores beside their nulls."""
    some = not result.scores["random_model"].isna().all()
    columns = [
        Column("label", "label by"),
        Column("score", "balanced accuracy (0.5: chance)"),
        Column("labels", "its label", "percent"),
        Column("other_latents", "another latent's", "percent"),
        Column("random_directions", "random directions", "percent"),
        *([Column("random_model", "random model", "percent")] if some else []),
        Column("latents"),
    ]
    return Table(result.scores, "what labels are worth", columns=columns, file="scores")


def features_page(result: FeaturesResult) -> Page:
    """What labels are worth, and the latents as a table."""
    alive = result.latents[result.latents["rate"] > 0]
    names = {"labels": "its label", "other_latents": "another latent's", "random_directions": "random directions"}
    names |= {"random_model": "random model"}
    scores = result.scores.assign(score=result.scores["score"] + ", " + result.scores["label"])
    shown = scores.melt("score", list(names), "of", "value").dropna(subset="value")
    shown["of"] = shown["of"].map(names)
    figure = dots(
        shown,
        "score",
        "of",
        "value",
        kind="percent",
        title="What labels are worth",
        caption="Mean balanced accuracy over latents; 50 % is chance.",
        x_label="balanced accuracy",
        zero=False,
    )
    columns = [
        Column("latent", kind="text"),
        Column("label", "heuristic label"),
        Column("rate", "fires", "percent"),
        Column("f1", "token rule F1", "decimal"),
        Column("detection", "detection (another's)", "percent", "detection_shuffled"),
        Column("fuzzing", "fuzzing (another's)", "percent", "fuzzing_shuffled"),
        Column("cluster", kind="text"),
    ]
    best = alive.sort_values(["detection", "f1"], ascending=False).head(200)
    sizes = result.latents.loc[result.latents["cluster"] >= 0, "cluster"].value_counts()
    return Page(
        title=f"Features: {result.sae}",
        answer=answer(result),
        picture=figure,
        lead=f"`{DASHBOARD}`, beside this page, has a card for every latent: examples, rates, tokens, neighbours.",
        tiles=[
            Tile("latents that fire", f"{len(alive):,}", f"of {len(result.latents):,}, in {len(result.coded):,} rows"),
            Tile("clusters", f"{len(sizes):,}", f"of {int(sizes.sum()):,} latents that fire together"),
        ],
        facts=[
            ("runs", ", ".join(result.runs)),
            ("hook point", result.hook_point),
            ("model", result.model),
            ("weights", result.weights[:16]),
            *((f"rows left out: {k}", f"{v:,}") for k, v in result.coded.left_out.items()),
        ],
        sections=[
            Section("What labels are worth", _WORTH, tables=[score_table(result)], notes=list(result.notes)),
            *_asked(result),
            Section(
                "Latents",
                "Those that their labels detect best; the file has all.",
                tables=[Table(_text(best), "latents", columns=columns, file="latents")],
            ),
        ],
    )


def _asked(result: FeaturesResult) -> list[Section]:
    """Labels by a model that was asked."""
    if result.asked is None:
        return []
    own = result.asked[(result.asked["arm"] == OWN) & result.asked["label"].notna()]
    own = own.merge(result.latents[["latent", "label"]].rename(columns={"label": "rule"}), on="latent")
    columns = [
        Column("latent", kind="text"),
        Column("label", "label"),
        Column("rule", "token-set rule"),
        Column("detection", "detection (another's)", "percent", "detection_shuffled"),
        Column("fuzzing", "fuzzing (another's)", "percent", "fuzzing_shuffled"),
    ]
    shown = own.assign(rule=own["rule"].str.replace("`", "")).sort_values("detection", ascending=False)
    told = result.asked_of
    weights = (told["weights_sha256"] or "weights unknown")[:16]
    judged = "by itself" if told["judge"] == "endpoint" else "by the words that they name"
    said = (
        f"Asked of `{result.judge}` ({weights}), which saw excerpts of one half of the texts; judged {judged} on the "
        "other half. A label is a hypothesis."
    )
    return [Section("Labels by a model", said, tables=[Table(shown, "labels", columns=columns, file="labels_asked")])]


def _text(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(label=frame["label"].str.replace("`", ""))
