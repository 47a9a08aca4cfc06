"""Small multiples: panels share their axes, and marks stand where their numbers say."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pandas as pd
import pytest

from sglang_probe.report.figures import Figure, panel_lines, panel_scatter


def _elements(figure: Figure, tag: str, css: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(figure.svg)
    return [e for e in root.iter() if e.tag.endswith(tag) and css in e.attrib.get("class", "").split()]


FRAME = pd.DataFrame(
    [("m", "v", 0.125, 0.2), ("m", "v", 0.5, 0.8), ("n", "v", 0.125, 0.4), ("n", "v", 0.5, 0.4)],
    columns=["policy", "protocol", "x", "y"],
)


def curves(frame: pd.DataFrame = FRAME, **more: object) -> Figure:
    return panel_lines(frame, "policy", "x", "y", "protocol", title="t", **more)  # type: ignore[arg-type]


def test_equal_values_stand_at_equal_heights_in_every_panel() -> None:
    dots = _elements(curves(), "circle", "dot")
    y = [float(d.attrib["cy"]) for d in dots]
    assert len(y) == 4
    assert y[2] == y[3] == pytest.approx((2 * y[0] + y[1]) / 3, abs=0.02)
    x = [float(d.attrib["cx"]) for d in dots]
    assert x[1] - x[0] == pytest.approx(x[3] - x[2], abs=0.02)


def test_a_logarithmic_axis_places_halvings_evenly() -> None:
    three = pd.DataFrame({"policy": "m", "protocol": "v", "x": [0.125, 0.25, 0.5], "y": 0.5})
    x = [float(d.attrib["cx"]) for d in _elements(curves(three, log_x=True), "circle", "dot")]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.02)


def test_the_reference_is_drawn_into_every_panel() -> None:
    behind = pd.DataFrame({"protocol": "v", "x": [0.125, 0.5], "y": [0.1, 0.2]})
    assert len(_elements(curves(behind=behind), "path", "leader")) == 2


def test_a_band_spans_its_interval_and_missing_points_are_not_drawn() -> None:
    frame = FRAME.assign(low=FRAME["y"] - 0.1, high=FRAME["y"] + 0.1)
    frame.loc[3, ["y", "low", "high"]] = math.nan
    figure = curves(frame, low="low", high="high")
    assert len(_elements(figure, "path", "area")) == 1
    assert len(_elements(figure, "circle", "dot")) == 3
    with pytest.raises(ValueError, match="needs both"):
        curves(frame, low="low")


def test_points_are_named_and_coloured_by_series() -> None:
    frame = FRAME.assign(budget=["1/8", "1/2", "1/8", "1/2"])
    figure = panel_scatter(frame, "protocol", "x", "y", "budget", "policy", title="t")
    dots = _elements(figure, "circle", "dot")
    assert [d.attrib["class"].split()[0] for d in dots] == ["s1", "s3", "s1", "s3"]
    assert dots[0][0].text == "m, 1/8: 12.5%, 20.0%"


def test_two_numbers_for_one_place_are_refused_and_no_number_says_so() -> None:
    with pytest.raises(ValueError, match="two values for"):
        curves(pd.concat([FRAME, FRAME.iloc[:1]]))
    assert "no data" in curves(FRAME.assign(y=math.nan)).svg
