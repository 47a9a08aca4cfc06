"""Figures of a drift study with the layers on the axis, for models with more of them than curves can be told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from sglang_probe.report.figures import Figure, fold, lines
from sglang_probe.report.page import Section
from sglang_probe.studies.pages import MANY_LAYERS, only
from sglang_probe.studies.query_drift.study import DriftResult
from sglang_probe.studies.query_drift.summary import ALL


def folded_if_many(result: DriftResult, figure: Figure) -> Figure:
    """A map of layers and heads, folded where it has many rows."""
    return fold(figure) if len(result.layers) > MANY_LAYERS else figure


def cosine_by_layer(by_layer: pd.DataFrame) -> Figure:
    """The centred cosine of the first and the last bin of steps.

    Args:
        by_layer: `Summary.steps` of that metric, without the mean over layers.
    """
    frame = by_layer
    if len(frame):
        # The first and the last bin: the bands of more of them hide each other.
        frame = _numbered(frame[frame["step"].isin([frame["step"].min(), frame["step"].max()])]).sort_values(
            ["step", "layer"], kind="stable"
        )
        frame = frame.assign(steps="from step " + frame["step"].astype(str))
    return _curves(
        frame,
        "value",
        "steps",
        title="Centred pre-RoPE cosine to the mean window query, by layer",
        caption="Means over heads and the steps of a bin; bands over prompts. The first and the last bin.",
        y_label="cosine",
    )


def excess_by_layer(result: DriftResult) -> list[Figure]:
    """Centred excess by layer, of the nearest and the farthest bin of distances."""
    if len(result.layers) <= MANY_LAYERS:
        return []
    part = only(result.found.excess, kind="centred")
    part = _numbered(part[part["layer"] != ALL]) if len(part) else part
    if len(part):
        part = part[part["distance"].isin([part["distance"].min(), part["distance"].max()])]
        part = part.sort_values(["distance", "layer"], kind="stable")
        part = part.assign(apart="from " + part["distance"].astype(str) + " apart")
    return [
        _curves(
            part,
            "excess",
            "apart",
            title="Excess drift by layer, centred",
            caption="Bands over prompts. The nearest and the farthest bin of distances.",
            y_label="prompt cosine minus decode cosine",
        )
    ]


def subspace_by_layer(result: DriftResult, names: Mapping[str, str]) -> list[Figure]:
    """Captured energy by layer.

    Args:
        names: of the measures that are shown.
    """
    if len(result.layers) <= MANY_LAYERS:
        return []
    part = only(result.found.subspace, measure=list(names))
    part = part.assign(queries=part["measure"].map(dict(names))) if len(part) else part
    return [
        _curves(
            part,
            "value",
            "queries",
            kind="percent",
            title="Captured energy by layer",
            y_label="share of the energy",
        )
    ]


def mass_by_layer(result: DriftResult) -> list[Section]:
    """What the window's choice holds at the last step of each layer, beside the baselines."""
    if len(result.layers) <= MANY_LAYERS:
        return []
    part = result.found.recall
    part = _numbered(part[(part["layer"] != ALL) & (part["step"] == part["step"].max())]) if len(part) else part
    chart = _curves(
        part,
        "value",
        "policy",
        kind="percent",
        title="Non-trivial attention mass on the positions that are kept, last bin of steps, by layer",
        caption="Bands over prompts.",
        y_label="share",
    )
    return [Section(heading="Which layers the window predicts", figures=[chart])]


def _curves(frame: pd.DataFrame, value: str, series: str, **words: Any) -> Figure:
    """A curve over the layers for each of `series`, with its band; `words` as of `lines`."""
    return lines(frame, "layer", value, series, low=f"{value}_low", high=f"{value}_high", x_label="layer", **words)


def _numbered(frame: pd.DataFrame) -> pd.DataFrame:
    """With layers as numbers: beside their mean they are text."""
    return frame.assign(layer=frame["layer"].astype(int))
