"""Small multiples: the same axes in every panel, so that many things compare without crossing lines.

`panel_lines` draws a few curves per panel, `panel_scatter` points. Axes are shared; ticks stand at the outer panels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from sglang_probe.report._axes import Scale, round_ticks, tick_labels
from sglang_probe.report._figure import Figure, listing, make_figure
from sglang_probe.report._frame import distinct, interval_columns, numbers, select
from sglang_probe.report._svg import WIDE, Canvas, mark_class, num, text_width, wrap
from sglang_probe.report.numbers import Kind, format_number

_GAP, _LEFT, _HEIGHT = 14.0, 42.0, 104.0

Draw = Callable[[Canvas, str, Scale, Scale], None]


def panel_lines(
    frame: pd.DataFrame,
    panel: str,
    x: str,
    y: str,
    series: str,
    *,
    title: str,
    caption: str = "",
    x_label: str = "",
    y_label: str = "",
    kind: Kind = "percent",
    low: str | None = None,
    high: str | None = None,
    behind: pd.DataFrame | None = None,
    x_ticks: Mapping[float, str] | None = None,
    log_x: bool = False,
) -> Figure:
    """A panel per value of `panel`, in each one curve per series with its band.

    On a logarithmic axis every value of `x` is a tick unless `x_ticks` says otherwise.

    Args:
        behind: columns `x`, `y` and `series`: curves drawn thin and dashed into every panel for comparison. The
            caption must say what they are.
        x_ticks: values of the x axis that are labelled, with their labels.
    """
    bounds = interval_columns(low, high)
    data = select(frame, [panel, series, x, y], unique=[panel, series, x], bounds=bounds)
    names = distinct(data[series]) if len(data) else []
    ys = [v for c in (y, *bounds) for v in numbers(data, c) if not math.isnan(v)]
    reference: dict[str, list[tuple[float, float]]] = {}
    if behind is not None:
        for s, *point in zip(behind[series], numbers(behind, x), numbers(behind, y), strict=True):
            reference.setdefault(str(s), []).append((point[0], point[1]))
    curves: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    columns = (numbers(data, c) for c in (x, y, *bounds))
    for p, s, *point in zip(map(str, data[panel]), map(str, data[series]), *columns, strict=True):
        curves.setdefault((p, s), []).append(tuple(point))

    if log_x and x_ticks is None:
        x_ticks = {v: format_number(v) for v in sorted({v for v in numbers(data, x) if not math.isnan(v)})}

    def inside(c: Canvas, name: str, across: Scale, up: Scale) -> None:
        for s, points in reference.items():
            if s in names:
                path = _path([(across(a), up(b)) for a, b in sorted(points) if not math.isnan(b)])
                c.path(path, f"{mark_class(names.index(s))} leader dash2")
        for i, s in enumerate(names):
            mine = sorted(p for p in curves.get((name, s), []) if not any(map(math.isnan, p)))
            if bounds and len(mine) > 1:
                band = [(across(p[0]), up(p[3])) for p in mine] + [(across(p[0]), up(p[2])) for p in reversed(mine)]
                c.path(_path(band) + "Z", f"{mark_class(i)} area")
            if len(mine) > 1:
                c.path(_path([(across(p[0]), up(p[1])) for p in mine]), f"{mark_class(i)} stroke", f"{name}, {s}")
            for p in mine:
                tip = f"{name}, {s}, {_tick(p[0], x_ticks)}: {format_number(p[1], kind)}"
                c.circle(across(p[0]), up(p[1]), 2.5, f"{mark_class(i)} dot", tip)

    legend = [(s, f"{mark_class(i)} stroke") for i, s in enumerate(names)] if len(names) > 1 else []
    draw = _drawing(
        distinct(data[panel]), numbers(data, x), ys, inside, legend, x_label, y_label, kind, x_ticks, log_x=log_x
    )
    formats: dict[str, Kind] = dict.fromkeys((y, *bounds), kind)
    return make_figure(title, caption, data, formats, draw if ys else None, listing(data, formats))


def panel_scatter(
    frame: pd.DataFrame,
    panel: str,
    x: str,
    y: str,
    series: str,
    label: str,
    *,
    title: str,
    caption: str = "",
    x_label: str = "",
    y_label: str = "",
    kind: Kind = "percent",
    x_kind: Kind = "percent",
) -> Figure:
    """A panel per value of `panel`, in each a point per row, coloured by series, named by `label` in its tip."""
    data = select(frame, [panel, series, label, x, y], unique=[panel, series, label])
    names = distinct(data[series]) if len(data) else []
    xs, ys = numbers(data, x), numbers(data, y)
    points: dict[str, list[tuple[float, float, int, str]]] = {}
    for p, s, text, a, b in zip(
        map(str, data[panel]), map(str, data[series]), map(str, data[label]), xs, ys, strict=True
    ):
        if not math.isnan(a) and not math.isnan(b):
            points.setdefault(p, []).append((a, b, names.index(s), f"{text}, {s}"))

    def inside(c: Canvas, name: str, across: Scale, up: Scale) -> None:
        for a, b, i, text in points.get(name, []):
            tip = f"{text}: {format_number(a, x_kind)}, {format_number(b, kind)}"
            c.circle(across(a), up(b), 3.2, f"{mark_class(i)} dot", tip)

    legend = [(s, f"{mark_class(i)} fill") for i, s in enumerate(names)]
    known = [v for v in ys if not math.isnan(v)]
    draw = _drawing(
        distinct(data[panel]),
        xs,
        known,
        inside,
        legend,
        x_label,
        y_label,
        kind,
        None,
        height=150.0,
        most=3,
        x_kind=x_kind,
    )
    formats: dict[str, Kind] = {x: x_kind, y: kind}
    return make_figure(title, caption, data, formats, draw if points else None, listing(data, formats))


def _drawing(
    panels: Sequence[str],
    xs: Sequence[float],
    ys: Sequence[float],
    inside: Draw,
    legend: Sequence[tuple[str, str]],
    x_label: str,
    y_label: str,
    kind: Kind,
    x_ticks: Mapping[float, str] | None,
    *,
    height: float = _HEIGHT,
    most: int = 5,
    log_x: bool = False,
    x_kind: Kind = "auto",
) -> Callable[[Canvas], None]:
    """What draws the grid of panels; `inside` draws one panel's marks."""
    known = [v for v in xs if not math.isnan(v)]
    bottom, top = min([0.0, *ys]), max([0.0, *ys])
    if kind == "percent" and 0.5 < top <= 1:
        top = 1.0
    y_ticks = round_ticks(bottom, top, 3)

    def draw(c: Canvas) -> None:
        columns = min(most, len(panels)) if c.width == WIDE else min(2, len(panels))
        first = c.legend(list(legend)) if legend else 0.0
        if y_label:
            c.text(0, first + 4, y_label, "muted", size=11)
            first += 14
        width = (c.width - _LEFT - 6) / columns
        heads = [wrap(p, width - _GAP, 11, True) for p in panels]
        at = first
        for start in range(0, len(panels), columns):
            row = list(panels[start : start + columns])
            rows = max(len(h) for h in heads[start : start + columns])
            plot_top = at + 15 * rows + 4
            up = Scale(y_ticks[0], y_ticks[-1], plot_top + height, plot_top)
            for i, name in enumerate(row):
                left = _LEFT + i * width
                right = left + width - _GAP
                pad = 5.0
                low, high = (min(known), max(known))
                if log_x or x_ticks is not None:
                    across = Scale(low, high, left + pad, right - pad, log_x)
                else:
                    ticks = round_ticks(min(0.0, low), high, 3)
                    across = Scale(ticks[0], ticks[-1], left + pad, right - pad)
                c.paragraph(left, at + 11, heads[start + i], "strong", size=11)
                for tick, text in zip(y_ticks, tick_labels(y_ticks, kind), strict=True):
                    c.line(left, up(tick), right, up(tick), "grid")
                    if i == 0:
                        c.text(left - 5, up(tick) + 4, text, "muted", "end", 10)
                c.line(left, plot_top + height, right, plot_top + height, "axis")
                marks = list(x_ticks.items()) if x_ticks is not None else []
                if x_ticks is None:
                    ticks = round_ticks(min(0.0, low), high, 3)
                    marks = list(zip(ticks, tick_labels(ticks, x_kind), strict=True))
                taken = -math.inf
                for tick, text in marks:
                    place, half = across(tick), text_width(text, 10) / 2
                    c.line(place, plot_top + height, place, plot_top + height + 3, "axis")
                    if place - half > taken + 3:
                        c.text(place, plot_top + height + 14, text, "muted", "middle", 10)
                        taken = place + half
                inside(c, name, across, up)
            at = plot_top + height + 26
        if x_label:
            c.text((_LEFT + c.width) / 2, at + 4, x_label, "muted", "middle", 11)
            at += 14
        c.height = at

    return draw


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{num(a)} {num(b)}" for a, b in points) if points else ""


def _tick(value: float, ticks: Mapping[float, str] | None) -> str:
    return (ticks or {}).get(value, format_number(value))
