"""Curves over a numeric axis. Names stand at the ends of the curves where there is room, else in a legend."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import pandas as pd

from sglang_probe.report._axes import Scale, decades, draw_ticks_below, log_ticks, round_ticks, tick_labels
from sglang_probe.report._figure import Figure, make_figure
from sglang_probe.report._frame import distinct, interval_columns, numbers, select
from sglang_probe.report._panels import panel_lines
from sglang_probe.report._svg import WIDE, Canvas, num, series_class, text_width, wrap
from sglang_probe.report.numbers import Kind, format_number

MOST_SERIES = 8


def lines(
    frame: pd.DataFrame,
    x: str,
    y: str,
    series: str | None = None,
    *,
    title: str,
    caption: str = "",
    x_label: str = "",
    y_label: str = "",
    kind: Kind = "auto",
    low: str | None = None,
    high: str | None = None,
    log_x: bool = False,
    log_y: bool = False,
    step: bool = False,
) -> Figure:
    """Curves of `y` over a numeric `x`, one per series, labelled at their ends; `low` and `high` draw a band.

    A missing value interrupts its curve. The y axis starts at zero unless `log_y`; exact zeros on a logarithmic axis
    are drawn as rings on a line of their own, because "bit-identical" is a result. `step` holds each value halfway to
    its neighbours, for values that belong to bins. More series than can be told apart get a panel each.
    """
    bounds = interval_columns(low, high)
    data = select(
        frame, [x, *([series] if series else []), y], unique=[x, *([series] if series else [])], bounds=bounds
    )
    names = distinct(data[series]) if series else [""]
    if series and len(names) > MOST_SERIES and not log_y:
        return panel_lines(
            data.assign(curve=y_label or y),
            series,
            x,
            y,
            "curve",
            title=title,
            caption=caption,
            x_label=x_label,
            y_label=y_label,
            kind=kind,
            low=low,
            high=high,
            log_x=log_x,
        )
    curves: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    owners = [str(s) for s in data[series]] if series else [""] * len(data)
    for name, point in zip(owners, zip(*(numbers(data, k) for k in (x, y, *bounds)), strict=True), strict=True):
        curves[name].append(point)
    for points in curves.values():
        points.sort()
    xs = [p[0] for points in curves.values() for p in points]
    ys = [v for points in curves.values() for p in points for v in p[1:] if not math.isnan(v)]
    if any(math.isnan(v) for v in xs):
        raise ValueError(f"column {x!r} has missing values; every point of a line needs a place")
    if log_x and min(xs, default=1) <= 0:
        raise ValueError(f"column {x!r} has values of zero or less, which a logarithmic axis cannot show")
    if log_y and min(ys, default=0) < 0:
        raise ValueError(f"column {y!r} has negative values, which a logarithmic axis cannot show")
    whole = all(v.is_integer() for v in xs)
    positive = [v for v in ys if v > 0]
    zero_row = log_y and len(positive) < len(ys)
    logarithmic = log_y and bool(positive)
    y_ticks: list[float]
    if logarithmic:
        bottom, top = decades(min(positive), max(positive))
        y_ticks = log_ticks(bottom, top, 6)
    else:
        bottom, top = min([0.0, *ys]), max([0.0, *ys])
        top = 1.0 if kind == "percent" and 0.5 < top <= 1 else top
        y_ticks = round_ticks(bottom, top, 5)
        bottom, top = min(bottom, y_ticks[0]), max(top, y_ticks[-1])

    def draw(c: Canvas) -> None:
        y_texts = tick_labels(y_ticks, kind)
        left = max([text_width(t, 11) for t in y_texts] + [10 if zero_row else 0]) + 8
        direct = max(map(text_width, names)) + 22 if series else 0
        beside = direct <= 0.3 * c.width
        first = 0.0
        if series and not beside:
            first = c.legend([(name, f"{series_class(i)} stroke{_dash(i)}") for i, name in enumerate(names)])
        if y_label:
            rows = wrap(y_label, c.width, 11)
            c.paragraph(0, first + 10, rows, "muted", size=11)
            first += len(rows) * 15 + 8
        plot_top, plot_bottom = first + 6, first + (250 if c.width == WIDE else 210)
        right = c.width - (max(direct, 14) if beside else 14)
        across = Scale(min(xs), max(xs), left + 6, right, log_x)
        up = Scale(bottom, top, plot_bottom - (26 if zero_row else 0), plot_top, logarithmic)

        for tick, text in zip(y_ticks, y_texts, strict=True):
            c.line(left, up(tick), right, up(tick), "axis" if tick == bottom and not zero_row else "grid")
            c.text(left - 6, up(tick) + 4, text, "muted", "end", 11)
        if zero_row:
            c.line(left, plot_bottom, right, plot_bottom, "axis")
            c.text(left - 6, plot_bottom + 4, "0", "muted", "end", 11)
        x_ticks = (
            log_ticks(min(xs), max(xs), 7)
            if log_x
            else round_ticks(min(xs), max(xs), 7 if c.width == WIDE else 4, whole)
        )
        x_ticks = [t for t in x_ticks if min(xs) <= t <= max(xs)] or xs[:1]
        draw_ticks_below(c, across, x_ticks, tick_labels(x_ticks, "auto"), plot_bottom)
        c.height = plot_bottom + 22
        if x_label:
            rows = wrap(x_label, right - left, 11)
            c.paragraph((left + right) / 2, plot_bottom + 36, rows, "muted", "middle", 11)
            c.height = plot_bottom + 26 + 15 * len(rows)

        def place(v: float) -> float:
            return plot_bottom if log_y and v == 0 else up(v)

        for i, name in enumerate(names):
            _draw_band(c, curves[name], across, place, i, step)
        zeros: Counter[float] = Counter()
        for i, name in enumerate(names):
            _draw_curve(c, curves[name], across, place, i, name, kind, step, zeros if log_y else None)
        if series and beside:
            ends = {i: [p for p in curves[name] if not math.isnan(p[1])][-1:] for i, name in enumerate(names)}
            placed = [(place(p[1]), across(p[0]), i) for i, last in ends.items() for p in last]
            heights = _spread([h for h, _, _ in placed], 14, plot_top, plot_bottom)
            for (h, end, i), to in zip(placed, heights, strict=True):
                if abs(to - h) > 3 or end < right - 1:
                    c.path(f"M{num(end + 4)} {num(h)}L{num(right + 8)} {num(to)}", f"{series_class(i)} leader")
                c.text(right + 12, to + 4, names[i], f"{series_class(i)} hue")

    formats: dict[str, Kind] = dict.fromkeys((y, *bounds), kind)
    return make_figure(title, caption, data, formats, draw if ys else None, _ranges(curves, y_label or y, kind))


def _draw_band(
    c: Canvas,
    points: Sequence[tuple[float, ...]],
    across: Scale,
    place: Callable[[float], float],
    index: int,
    step: bool,
) -> None:
    for run in _runs([p for p in points if len(p) == 4], lambda p: not any(map(math.isnan, p))):
        lower = _vertices([(across(p[0]), place(p[2])) for p in run], step)
        upper = _vertices([(across(p[0]), place(p[3])) for p in run], step)
        c.path(_polyline([*upper, *reversed(lower)]) + "Z", f"{series_class(index)} area")


def _draw_curve(
    c: Canvas,
    points: Sequence[tuple[float, ...]],
    across: Scale,
    place: Callable[[float], float],
    index: int,
    name: str,
    kind: Kind,
    step: bool,
    zeros: Counter[float] | None,
) -> None:
    """Line through each unbroken run; dots where points are few or stand alone.

    On a logarithmic axis zeros are rings; `zeros` counts them at each x, so that a later series rings the earlier ones.
    """
    hue = series_class(index)
    shown = [p for p in points if not math.isnan(p[1])]
    alone: set[float] = set()
    for run in _runs(points, lambda p: not math.isnan(p[1]) and (zeros is None or p[1] != 0)):
        vertices = _vertices([(across(p[0]), place(p[1])) for p in run], step)
        if len(run) > 1:
            c.path(_polyline(vertices), f"{hue} stroke{_dash(index)}", name)
        else:
            alone.add(run[0][0])
    for p in shown:
        tip = f"{name + ', ' if name else ''}{format_number(p[0])}: {format_number(p[1], kind)}"
        if zeros is not None and p[1] == 0:
            c.circle(across(p[0]), place(0), 3.5 + 3 * zeros[p[0]], f"{hue} ring", tip)
            zeros[p[0]] += 1
        elif p[0] in alone or (len(shown) <= 24 and not step):
            c.circle(across(p[0]), place(p[1]), 3.5, f"{hue} dot", tip)


def _runs(
    points: Sequence[tuple[float, ...]], keep: Callable[[tuple[float, ...]], bool]
) -> list[list[tuple[float, ...]]]:
    runs: list[list[tuple[float, ...]]] = [[]]
    for p in points:
        if keep(p):
            runs[-1].append(p)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _vertices(points: list[tuple[float, float]], step: bool) -> list[tuple[float, float]]:
    """The points, or the corners of a staircase that changes halfway between them."""
    if not step:
        return points
    corners = points[:1]
    for (x1, y1), (x2, y2) in pairwise(points):
        corners += [((x1 + x2) / 2, y1), ((x1 + x2) / 2, y2)]
    return [*corners, *points[-1:]]


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{num(x)} {num(y)}" for x, y in points)


def _spread(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, at least `distance` apart, inside the limits where they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    at = low - distance
    for i in order:
        at = placed[i] = max(wanted[i], at + distance)
    at = high + distance
    for i in reversed(order):
        at = placed[i] = min(placed[i], at - distance)
    return placed


def _dash(index: int) -> str:
    """After six series the colours repeat, dashed and then dotted."""
    return ("", " dash2", " dash3")[index // 6 % 3]


def _ranges(curves: Mapping[str, Sequence[tuple[float, ...]]], what: str, kind: Kind) -> str:
    said = []
    for name, points in curves.items():
        values = [p[1] for p in points if not math.isnan(p[1])]
        if values:
            ends = f"from {format_number(values[0], kind)} to {format_number(values[-1], kind)}"
            extremes = f"lowest {format_number(min(values), kind)}, highest {format_number(max(values), kind)}"
            said.append(f"{name or what}: {ends}, {extremes}")
    return f"{what}. " + "; ".join(said) + "."
