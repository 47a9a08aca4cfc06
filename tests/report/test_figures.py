"""What is drawn is proportional to the numbers; what is missing is drawn as missing; what is ambiguous is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from xml.etree import ElementTree

import pandas as pd
import pytest

from sglang_probe.report.figures import Figure, dots, grouped_bars, heatmap, lines, request_strips, token_strip

NAN = math.nan
ARIAL_BOLD_X = 0.556  # width of the letter x, in em
EVIL = "<script>alert('&')</script>"


@pytest.fixture
def coverage() -> pd.DataFrame:
    return pd.DataFrame(
        [("system", "on", 0.08), ("system", "off", 1.0), ("user", "on", 0.97), ("user", "off", 0.5)],
        columns=["segment", "arm", "coverage"],
    )


# ---- bars ----


def test_bar_lengths_are_proportional_to_the_values(coverage: pd.DataFrame) -> None:
    for svg in _drawings(grouped_bars(coverage, "segment", "arm", "coverage", title="t", kind="percent")):
        widths = [float(e.attrib["width"]) for e in _by_class(svg, "bar")]
        full = widths[1]
        assert widths == pytest.approx([0.08 * full, full, 0.97 * full, 0.5 * full], abs=0.02)


def test_percent_bars_start_at_the_left_end_of_a_track_for_the_whole(coverage: pd.DataFrame) -> None:
    for svg in _drawings(grouped_bars(coverage, "segment", "arm", "coverage", title="t", kind="percent")):
        bars, tracks = _by_class(svg, "bar"), _by_class(svg, "track")
        assert [b.attrib["x"] for b in bars] == [t.attrib["x"] for t in tracks]
        assert {t.attrib["width"] for t in tracks} == {bars[1].attrib["width"]}  # the bar of 100 %


def test_each_bar_is_labelled_with_its_exact_percentage(coverage: pd.DataFrame) -> None:
    for svg in _drawings(grouped_bars(coverage, "segment", "arm", "coverage", title="t", kind="percent")):
        assert [e.text for e in _by_class(svg, "strong") if "%" in (e.text or "")] == ["8.0%", "100%", "97.0%", "50.0%"]


def test_a_missing_or_absent_bar_says_no_value_and_a_zero_bar_says_zero() -> None:
    frame = pd.DataFrame({"c": ["a", "a", "b"], "s": ["p", "q", "p"], "v": [0.0, NAN, 0.5]})
    for svg in _drawings(grouped_bars(frame, "c", "s", "v", title="t", kind="percent")):
        assert [e.text for e in _by_class(svg, "none")] == ["no value", "no value"]  # (a, q) is NaN, (b, q) is absent
        assert "0%" in _texts(svg)
        assert [float(e.attrib["width"]) == 0 for e in _by_class(svg, "bar")] == [True, False]


def test_negative_bars_end_where_positive_ones_start() -> None:
    frame = pd.DataFrame({"c": ["a", "b"], "s": ["p", "p"], "v": [-2e-9, 4e-9]})
    for svg in _drawings(grouped_bars(frame, "c", "s", "v", title="t")):
        down, up = ((float(e.attrib["x"]), float(e.attrib["width"])) for e in _by_class(svg, "bar"))
        assert down[0] + down[1] == pytest.approx(up[0], abs=0.02)
        assert up[1] == pytest.approx(2 * down[1], abs=0.03)


def test_whiskers_span_the_interval_on_the_scale_of_the_bars() -> None:
    frame = pd.DataFrame({"c": ["a"], "s": ["p"], "v": [0.5], "lo": [0.25], "hi": [0.75]})
    for svg in _drawings(grouped_bars(frame, "c", "s", "v", title="t", kind="percent", low="lo", high="hi")):
        (bar,), (whisker,) = _by_class(svg, "bar"), _by_class(svg, "whisker")
        zero, half = float(bar.attrib["x"]), float(bar.attrib["width"])
        low, high = (float(x) for x in re.search(r"v6M(\S+) \S+H([\d.]+)m", whisker.attrib["d"]).groups())
        assert (low - zero, high - zero) == pytest.approx((half / 2, 1.5 * half), abs=0.02)


def test_long_category_names_are_wrapped_and_stay_whole_and_inside_the_drawing() -> None:
    name = "a rather long name of a class of tokens/blocks.11.attn.hook_rot_q/" + "x" * 90
    frame = pd.DataFrame({"c": [name], "s": ["p"], "v": [1.0]})
    figure = grouped_bars(frame, "c", "s", "v", title="t", unit="tokens/s")
    for svg, room in zip(_drawings(figure), (0.34 * 720, 340), strict=True):
        rows = [t for t in _texts(svg) if "tokens/s" not in t]
        assert "".join(rows).replace(" ", "") == name.replace(" ", "")
        assert max(row.count("x") for row in rows) * 12 * ARIAL_BOLD_X < room


def test_two_values_for_one_bar_are_refused(coverage: pd.DataFrame) -> None:
    twice = pd.concat([coverage, coverage.head(1)])
    with pytest.raises(ValueError, match=r"two values for segment='system', arm='on'"):
        grouped_bars(twice, "segment", "arm", "coverage", title="t")


def test_an_unknown_column_is_named(coverage: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"no column 'covrage'; the frame has segment, arm, coverage"):
        grouped_bars(coverage, "segment", "arm", "covrage", title="t")


# ---- lines ----


def test_points_are_placed_linearly_on_both_axes() -> None:
    frame = pd.DataFrame({"x": [0, 10, 40], "y": [0.0, 0.25, 1.0]})
    for svg in _drawings(lines(frame, "x", "y", title="t", kind="percent")):
        (a, b, c) = [(float(e.attrib["cx"]), float(e.attrib["cy"])) for e in _by_class(svg, "dot")]
        assert (b[0] - a[0]) / (c[0] - a[0]) == pytest.approx(0.25, abs=0.001)
        assert (b[1] - a[1]) / (c[1] - a[1]) == pytest.approx(0.25, abs=0.001)


@pytest.mark.parametrize("ys", [(-0.04, 0.38, 0.82), (-0.13, 0.25), (-0.021, -0.01), (0.0, 0.3)])
def test_the_grid_lies_within_the_plot(ys: tuple[float, ...]) -> None:
    """Ticks are those that the range was widened to; others, found anew for the wider range, would leave it."""
    frame = pd.DataFrame({"x": range(len(ys)), "y": ys})
    for svg in _drawings(lines(frame, "x", "y", title="t")):
        ends = [re.findall(r"[-\d.]+", e.attrib["d"]) for e in _by_class(svg, "grid") + _by_class(svg, "axis")]
        heights = [float(y1) for _x1, y1, _x2, y2 in ends if y1 == y2]
        dots = [float(e.attrib["cy"]) for e in _by_class(svg, "dot")]
        assert min(heights) <= min(dots)
        assert max(dots) <= max(heights)
        assert max(heights) - min(heights) < 250


def test_log_axes_place_equal_ratios_at_equal_distances() -> None:
    frame = pd.DataFrame({"x": [1, 10, 1000], "y": [1e-7, 1e-6, 1e-4]})
    for svg in _drawings(lines(frame, "x", "y", title="t", log_x=True, log_y=True)):
        (a, b, c) = [(float(e.attrib["cx"]), float(e.attrib["cy"])) for e in _by_class(svg, "dot")]
        assert (b[0] - a[0]) / (c[0] - a[0]) == pytest.approx(1 / 3, abs=0.001)
        assert (b[1] - a[1]) / (c[1] - a[1]) == pytest.approx(1 / 3, abs=0.001)


def test_a_missing_value_breaks_the_curve_and_is_not_drawn() -> None:
    frame = pd.DataFrame({"x": [0, 1, 2, 3, 4], "y": [1, 1, NAN, 1, 1]})
    for svg in _drawings(lines(frame, "x", "y", title="t")):
        assert [e.attrib["d"].count("L") for e in _by_class(svg, "stroke")] == [1, 1]
        assert len(_by_class(svg, "dot")) == 4


def test_zeros_on_a_log_axis_are_rings_that_do_not_hide_each_other() -> None:
    frame = pd.DataFrame({"x": [0, 1, 0, 1], "y": [0.0, 1e-3, 0.0, 1e-4], "s": ["a", "a", "b", "b"]})
    for svg in _drawings(lines(frame, "x", "y", "s", title="t", log_y=True)):
        rings = _by_class(svg, "ring")
        assert len({(r.attrib["cx"], r.attrib["cy"]) for r in rings}) == 1
        assert len({r.attrib["r"] for r in rings}) == len(rings) == 2


def test_all_zeros_on_a_log_axis_are_drawn_as_zeros() -> None:
    for svg in _drawings(lines(pd.DataFrame({"x": [0, 1], "y": [0.0, 0.0]}), "x", "y", title="t", log_y=True)):
        assert len(_by_class(svg, "ring")) == 2


def test_every_series_is_named_once_in_its_colour_or_in_a_legend() -> None:
    names = ["cache_on", "cache_off", "salted"]
    frame = pd.DataFrame([(x, s, 1.0) for s in names for x in (0, 1)], columns=["x", "s", "y"])
    for svg in _drawings(lines(frame, "x", "y", "s", title="t", kind="percent")):
        assert sorted(t for t in _texts(svg) if t in names) == sorted(names)


@pytest.mark.parametrize(("end", "anchor"), [(1.0, 0), (0.0, -1)], ids=["at the top", "at the bottom"])
def test_labels_of_curves_that_end_together_are_spread_into_the_plot(end: float, anchor: int) -> None:
    frame = pd.DataFrame([(x, f"s{i}", end) for i in range(5) for x in (0, 1)], columns=["x", "s", "y"])
    wide = _drawings(lines(frame, "x", "y", "s", title="t", kind="percent"))[0]
    heights = sorted(float(e.attrib["y"]) for e in _by_class(wide, "hue"))
    assert min(b - a for a, b in pairwise(heights)) >= 14 - 0.01
    assert heights[anchor] == pytest.approx(float(_by_class(wide, "dot")[0].attrib["cy"]) + 4, abs=0.02)


def test_the_band_runs_from_low_to_high() -> None:
    frame = pd.DataFrame({"x": [0, 1], "y": [0.5, 0.5], "lo": [0.0, 0.0], "hi": [1.0, 1.0]})
    svg = _drawings(lines(frame, "x", "y", title="t", kind="percent", low="lo", high="hi"))[0]
    (area,), dots = _by_class(svg, "area"), _by_class(svg, "dot")
    ys = {float(y) for y in re.findall(r"[ML]\S+ ([\d.]+)", area.attrib["d"])}
    assert sum(ys) / 2 == pytest.approx(float(dots[0].attrib["cy"]), abs=0.02)
    assert len(ys) == 2


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        ({"x": [0, 1], "y": [1, 1]}, {"log_x": True}, "zero or less"),
        ({"x": [1, 2], "y": [-1, 1]}, {"log_y": True}, "negative"),
        ({"x": [NAN, 2], "y": [1, 1]}, {}, "missing values"),
        ({"x": [1, 2], "y": [math.inf, 1]}, {}, "infinite"),
        ({"x": [1, 1], "y": [1, 2]}, {}, "two values for x="),
        ({"x": [1, 2], "y": [1, 2]}, {"low": "y"}, "both"),
    ],
)
def test_what_an_axis_cannot_show_is_refused(frame: dict[str, list[float]], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lines(pd.DataFrame(frame), "x", "y", title="t", **options)


# ---- heatmap ----


def test_cells_print_percentages_and_missing_cells_are_hatched_and_named() -> None:
    frame = pd.DataFrame(
        [("system", "0-63", 0.08), ("system", "64-127", NAN), ("user", "0-63", 1.0)], columns=["row", "bin", "v"]
    )
    for svg in _drawings(heatmap(frame, "row", "bin", "v", title="t")):
        assert {"8", "100", "no tokens"} <= set(_texts(svg))
        tips = [e.findtext("title") for e in _by_class(svg, "hatch") if e.find("title") is not None]
        assert tips == ["system, 64-127: no tokens", "user, 64-127: no tokens"]  # one NaN, one absent


def test_a_complete_heatmap_has_no_key_for_missing_cells() -> None:
    frame = pd.DataFrame([("a", "x", 0.5)], columns=["row", "bin", "v"])
    for svg in _drawings(heatmap(frame, "row", "bin", "v", title="t")):
        assert "no tokens" not in _texts(svg)
        assert not _by_class(svg, "hatch")


def test_shade_grows_linearly_with_the_value() -> None:
    frame = pd.DataFrame([("a", "x", 0.0), ("a", "y", 0.5), ("a", "z", 1.0)], columns=["row", "bin", "v"])
    svg = _drawings(heatmap(frame, "row", "bin", "v", title="t"))[0]
    low, middle, high = (float(e.attrib["fill-opacity"]) for e in _by_class(svg, "heat")[:3])
    assert low < middle < high == 1
    assert middle == pytest.approx((low + high) / 2, abs=0.006)


def test_values_are_left_out_where_cells_are_too_narrow() -> None:
    frame = pd.DataFrame([("a", f"b{i}", 0.5) for i in range(60)], columns=["row", "bin", "v"])
    wide, narrow = _drawings(heatmap(frame, "row", "bin", "v", title="t"))
    assert ("50" in _texts(wide), "50" in _texts(narrow)) == (False, False)
    few = _drawings(heatmap(frame.head(10), "row", "bin", "v", title="t"))
    assert [_texts(svg).count("50") for svg in few] == [10, 10]


# ---- token strip ----

SEGMENTS = [(0, 4, "template"), (4, 30, "system"), (30, 40, "user"), (40, 50, "assistant")]


def test_runs_of_tokens_are_as_long_as_their_share_of_the_request() -> None:
    strips = {"on": [(0, 30, "reused"), (30, 40, "computed"), (40, 50, "decode")]}
    for svg in _drawings(token_strip(strips, SEGMENTS, title="t")):
        widths = {
            e.findtext("title"): float(e.attrib["width"]) for e in svg.iter("rect") if e.find("title") is not None
        }
        unit = widths["on: 30 to 39 computed (10 tokens)"] / 10
        assert widths["on: 0 to 29 reused (30 tokens)"] == pytest.approx(30 * unit, abs=0.02)
        assert widths["on: 40 to 49 decode (10 tokens)"] == pytest.approx(10 * unit, abs=0.02)


def test_each_arm_says_how_many_tokens_had_which_fate() -> None:
    strips = {"on": [(0, 30, "reused"), (30, 40, "computed"), (40, 50, "decode")], "off": [(0, 40, "computed")]}
    for svg in _drawings(token_strip(strips, SEGMENTS, title="t")):
        expected = {"computed 10", "decode 10", "reused 30", "computed 40", "no record 10"}
        assert expected <= set(_texts(svg))


def test_positions_without_a_span_are_shown_as_gaps_and_counted() -> None:
    figure = token_strip({"on": [(5, 10, "computed")]}, [(0, 20, "user")], title="t")
    gaps = figure.data[figure.data["fate"] == "no record"]
    assert gaps[["start", "end", "tokens"]].values.tolist() == [[0, 5, 5], [10, 20, 10]]
    for svg in _drawings(figure):
        tips = [e.findtext("title") for e in _by_class(svg, "gap") if e.find("title") is not None]
        assert tips == ["on: 0 to 4 no record (5 tokens)", "on: 10 to 19 no record (10 tokens)"]


def test_every_named_segment_has_a_bracket_on_its_own_line() -> None:
    for svg in _drawings(token_strip({"on": [(0, 50, "computed")]}, SEGMENTS, title="t")):
        brackets = _by_class(svg, "bracket")
        assert [b.findtext("title", "").split(":")[0] for b in brackets] == [n for _, _, n in SEGMENTS]
        assert len({b.attrib["d"].split("V")[1].split("H")[0] for b in brackets}) == len(SEGMENTS)


def test_the_table_cuts_spans_at_segment_borders_and_loses_no_token() -> None:
    figure = token_strip({"on": [(0, 35, "reused"), (35, 50, "computed")]}, SEGMENTS, title="t")
    assert figure.data.values.tolist() == [
        ["on", 0, 4, 4, "template", "reused"],
        ["on", 4, 30, 26, "system", "reused"],
        ["on", 30, 35, 5, "user", "reused"],
        ["on", 35, 40, 5, "user", "computed"],
        ["on", 40, 50, 10, "assistant", "computed"],
    ]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 10, "computed"), (9, 12, "reused")], "overlaps"),
        ([(3, 3, "computed")], "empty"),
        ([(-1, 3, "computed")], "negative"),
        ([(0, 3, "guessed")], "unknown fate 'guessed'"),
    ],
)
def test_impossible_spans_are_refused(spans: list[tuple[int, int, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_strip({"on": spans}, [], title="t")


# ---- all figures ----

EMPTY = pd.DataFrame()
NOTHING: dict[str, Callable[[], Figure]] = {
    "bars": lambda: grouped_bars(EMPTY, "c", "s", "v", title="t"),
    "bars of NaN": lambda: grouped_bars(pd.DataFrame({"c": ["a"], "s": ["p"], "v": [NAN]}), "c", "s", "v", title="t"),
    "lines": lambda: lines(EMPTY, "x", "y", "s", title="t", log_x=True, log_y=True),
    "lines of NaN": lambda: lines(pd.DataFrame({"x": [1], "y": [NAN]}), "x", "y", title="t"),
    "heatmap": lambda: heatmap(EMPTY, "r", "k", "v", title="t"),
    "heatmap without rows": lambda: heatmap(pd.DataFrame({"r": [], "k": [], "v": []}), "r", "k", "v", title="t"),
    "dots": lambda: dots(EMPTY, "r", "s", "v", title="t", panel="p", low="a", high="b"),
    "dots of NaN": lambda: dots(pd.DataFrame({"r": ["a"], "s": ["b"], "v": [NAN]}), "r", "s", "v", title="t"),
    "requests": lambda: request_strips({}, title="t"),
    "requests without spans": lambda: request_strips({"a": []}, title="t"),
    "strip": lambda: token_strip({}, [], title="t"),
    "strip without spans": lambda: token_strip({"on": []}, [], title="t"),
}


@pytest.mark.parametrize("make", NOTHING.values(), ids=NOTHING.keys())
def test_nothing_to_draw_is_said_and_not_drawn(make: Callable[[], Figure]) -> None:
    for svg in _drawings(make()):
        assert _texts(svg) == ["no data"]
        assert svg.findtext("desc") == "no data"


SPOILED: dict[str, Callable[[], Figure]] = {
    "bars": lambda: grouped_bars(
        pd.DataFrame({"c": [EVIL], "s": [EVIL], "v": [1.0]}), "c", "s", "v", title=EVIL, unit=EVIL
    ),
    "lines": lambda: lines(
        pd.DataFrame({"x": [1, 2], "s": [EVIL, EVIL + "2"], "v": [1.0, 2.0]}),
        "x", "v", "s", title=EVIL, x_label=EVIL, y_label=EVIL,
    ),
    "heatmap": lambda: heatmap(
        pd.DataFrame({"r": [EVIL, EVIL + "2"], "k": [EVIL, EVIL + "2"], "v": [1.0, 0.5]}),
        "r", "k", "v", title=EVIL, column_label=EVIL, missing=EVIL,
    ),
    "dots": lambda: dots(
        pd.DataFrame({"r": [EVIL], "s": [EVIL], "p": [EVIL], "v": [1.0]}), "r", "s", "v", title=EVIL, panel="p",
        x_label=EVIL, references=pd.DataFrame({"p": [EVIL], "name": [EVIL], "value": [0.5]}),
    ),
    "requests": lambda: request_strips({EVIL: [(0, 9, "computed")]}, title=EVIL, position_label=EVIL),
    "strip": lambda: token_strip({EVIL: [(0, 9, "computed")]}, [(0, 9, EVIL)], title=EVIL, position_label=EVIL),
}  # fmt: skip


@pytest.mark.parametrize("make", SPOILED.values(), ids=SPOILED.keys())
def test_markup_in_any_text_stays_text(make: Callable[[], Figure]) -> None:
    for svg in _drawings(make()):
        assert svg.findtext("title") == EVIL
        assert {e.tag for e in svg.iter()} <= {"svg", "title", "desc", "text", "rect", "path", "circle"}
        assert any("script>" in t for t in _texts(svg))


def test_a_drawing_of_its_own_is_a_file_with_colours_and_paper(coverage: pd.DataFrame) -> None:
    figure = grouped_bars(coverage, "segment", "arm", "coverage", title="t & u", kind="percent")
    root = ElementTree.fromstring(figure.standalone())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    x, y, width, height = map(float, root.attrib["viewBox"].split())
    assert (x, y, width) == (-16, -16, 720 + 32)
    assert height == pytest.approx(float(_drawings(figure)[0].attrib["viewBox"].split()[3]) + 32)
    style = next(e for e in root.iter() if e.tag.endswith("style"))
    used = set(re.findall(r'class="([^"]*)"', figure.svg))
    assert {c for names in used for c in names.split()} - {"wide", "bar"} <= set(
        re.findall(r"[.]([\w-]+)", style.text or "")
    )


def test_requests_stand_under_each_other_on_one_axis() -> None:
    rows = {"request 0": [(0, 40, "computed")], "request 1": [(0, 20, "reused"), (20, 30, "computed")]}
    figure = request_strips(rows, title="t")
    for svg in _drawings(figure):
        boxes = {e.findtext("title"): e for e in svg.iter("rect") if e.find("title") is not None}
        first, second = (
            boxes[t] for t in ("request 0: 0 to 39 computed (40 tokens)", "request 1: 0 to 19 reused (20 tokens)")
        )
        assert float(first.attrib["width"]) == pytest.approx(2 * float(second.attrib["width"]), abs=0.02)
        assert first.attrib["x"] == second.attrib["x"]
        assert not _by_class(svg, "gap")  # a shorter request is no gap
        assert {"computed in prefill", "reused from the cache: no row"} <= set(_texts(svg))


# ---- dots ----


RANKED = pd.DataFrame(
    [
        (p, m, b, v, v - 0.1, v + 0.1)
        for p in ("t", "u")
        for m, v in (("best", 0.8), ("worst", 0.2))
        for b in ("1/8", "1/2")
    ],
    columns=["task", "method", "budget", "v", "lo", "hi"],
)
LINES = pd.DataFrame(
    [("t", "random", 0.2, "1/8"), ("t", "random", 0.8, "1/2"), ("t", "full", 1.0, ""), ("u", "full", 1.0, "")],
    columns=["task", "name", "value", "series"],
)


def ranked(**more: object) -> Figure:
    how = {"panel": "task", "kind": "percent", "low": "lo", "high": "hi", "references": LINES} | more
    return dots(RANKED, "method", "budget", "v", title="t", **how)


def test_dots_stand_at_their_values_in_every_panel_with_their_intervals() -> None:
    for svg in _drawings(ranked()):
        circles = [
            (float(e.attrib["cx"]), float(e.attrib["cy"]))
            for e in _by_class(svg, "dot")
            if e.find("title") is not None and e.tag == "circle"
        ]
        assert len(circles) == 4  # the first budget; the second one's marks are squares
        best, worst = circles[0], circles[1]
        assert best[0] > worst[0]
        assert best[1] < worst[1]
        spans = [re.findall(r"[\d.]+", e.attrib["d"]) for e in _by_class(svg, "interval")]
        assert len(spans) == 8
        assert (float(spans[0][0]) + float(spans[0][2])) / 2 == pytest.approx(best[0], abs=0.02)


def test_reference_lines_are_named_and_take_the_colour_of_their_series() -> None:
    for svg in _drawings(ranked()):
        rules = [e for e in _by_class(svg, "rule") if e.find("title") is not None]
        assert [e.findtext("title") for e in rules] == [
            "t, random: 20.0%",
            "t, random: 80.0%",
            "t, full: 100%",
            "u, full: 100%",
        ]
        assert [e.attrib["class"].split()[0] for e in rules] == ["s1", "s3", "ink", "ink"]
        assert {"random", "full", "1/8", "1/2"} <= set(_texts(svg))


def test_dots_survive_absent_intervals_and_missing_values() -> None:
    frame = RANKED.drop(columns=["lo", "hi"]).assign(v=lambda d: d["v"].where(d["method"] == "best"))
    figure = dots(frame, "method", "budget", "v", title="t", panel="task", low="lo", high="hi")
    for svg in _drawings(figure):
        assert not _by_class(svg, "interval")
        assert len([e for e in _by_class(svg, "dot") if e.find("title") is not None]) == 4


def test_shapes_tell_series_apart_without_colour() -> None:
    frame = pd.DataFrame([("a", f"s{i}", i / 4) for i in range(4)], columns=["row", "series", "v"])
    svg = _drawings(dots(frame, "row", "series", "v", title="t"))[0]
    marks = [e for e in _by_class(svg, "dot") if e.find("title") is not None]
    assert len({re.sub(r"[\d. ]+", "", e.attrib.get("d", "circle")) for e in marks}) == 4


@pytest.mark.parametrize("count", [7, 19])
def test_more_series_than_colours_change_the_figure(count: int) -> None:
    frame = pd.DataFrame([(c, f"s{i}", 0.5) for c in "ab" for i in range(count)], columns=["c", "s", "v"])
    svg = _drawings(grouped_bars(frame, "c", "s", "v", title="t", kind="percent"))[0]
    assert not _by_class(svg, "bar")
    assert len(_by_class(svg, "heat")) >= 2 * count
    curves = pd.DataFrame([(x, f"s{i}", 0.5) for x in (0, 1) for i in range(count + 2)], columns=["x", "s", "v"])
    svg = _drawings(lines(curves, "x", "v", "s", title="t", kind="percent"))[0]
    assert {f"s{i}" for i in range(count + 2)} <= {e.text for e in _by_class(svg, "strong")}


def test_control_characters_do_not_break_the_drawing() -> None:
    frame = pd.DataFrame({"c": ["a\x00\x1b[31mb"], "s": ["p"], "v": [1.0]})
    assert "a[31mb" in _texts(_drawings(grouped_bars(frame, "c", "s", "v", title="t"))[0])


def test_the_description_reads_the_numbers_to_those_who_do_not_see_the_bars(coverage: pd.DataFrame) -> None:
    svg = _drawings(grouped_bars(coverage, "segment", "arm", "coverage", title="t", kind="percent"))[0]
    assert svg.findtext("desc") == "system, on, 8.0%; system, off, 100%; user, on, 97.0%; user, off, 50.0%."
    assert svg.attrib["role"] == "img"


def _drawings(figure: Figure) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(figure.svg), ElementTree.fromstring(figure.svg_narrow)]


def _by_class(svg: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [e for e in svg.iter() if name in e.attrib.get("class", "").split()]


def _texts(svg: ElementTree.Element) -> list[str]:
    return [e.text or "" for e in svg.iter("text")]
