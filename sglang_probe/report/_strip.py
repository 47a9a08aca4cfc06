"""The token strip: one request, position by position, and what became of each token.

Spans are checked before they are drawn: an overlap or an unknown fate raises, and a position that no span covers is
shown as "no record" instead of being closed up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import pandas as pd

from sglang_probe.report._axes import Scale, draw_ticks_below, round_ticks, tick_labels
from sglang_probe.report._figure import Figure, make_figure
from sglang_probe.report._svg import WIDE, Canvas, num, text_width, wrap

Span = tuple[int, int, str]

FATES = ("computed", "decode", "reused", "dropped", "unrequested")
NO_RECORD = "no record"
FATES_IN_WORDS = {
    "computed": "computed in prefill",
    "decode": "computed in decode",
    "reused": "reused from the cache: no row",
    "dropped": "dropped: its facts were lost",
    "unrequested": "not asked for",
    NO_RECORD: NO_RECORD,
}


def token_strip(
    strips: Mapping[str, Sequence[Span]],
    segments: Sequence[Span],
    *,
    title: str,
    caption: str = "",
    position_label: str = "position",
) -> Figure:
    """One request, position by position: a strip per arm, coloured by the fate of each token, over the named segments.

    Args:
        strips: per arm, spans `(start, end, fate)`, end exclusive; the fates are `FATES`. A position in no span is
            drawn as a gap, "no record".
        segments: spans `(start, end, name)`; each name gets a line of its own below the strips. Empty ones, such as an
            output of no token that was run, are left out.
    """
    segments = [s for s in segments if s[0] != s[1]]
    for arm, spans in strips.items():
        _check_fates(spans, f"arm {arm!r}")
    _check_spans(segments, "the segments")
    total = max([end for spans in (*strips.values(), segments) for _, end, _ in spans], default=0)
    filled = {arm: _fill_gaps(spans, total) for arm, spans in strips.items()}
    counts = {arm: _tokens_by_name(spans) for arm, spans in filled.items()}
    lanes = list(dict.fromkeys(name for _, _, name in segments))

    def draw(c: Canvas) -> None:
        gutter = min(max(text_width(n, 11) for n in (position_label, *lanes)) + 14, 0.3 * c.width)
        x = Scale(0, total, gutter, c.width - 1)
        y = 0.0
        for arm, spans in filled.items():
            keys = [(f"{fate} {n:,}", fate) for fate, n in counts[arm].items()]
            key_width = sum(text_width(t, 11) + 33 for t, _ in keys)
            rows = wrap(arm, c.width - gutter, bold=True)
            c.paragraph(gutter, y + 12, rows, "strong")
            if len(rows) == 1 and text_width(arm, bold=True) + key_width <= c.width - gutter:
                _draw_fate_key(c, keys, y + 12, c.width - key_width + 16)
                y += 20
            else:
                y = _draw_fate_key(c, keys, y + 12 + 15 * len(rows), gutter) + 8
            for start, end, fate in spans:
                tip = f"{arm}: {start:,} to {end - 1:,} {fate} ({end - start:,} tokens)"
                _draw_fate(c, x(start), y, x(end) - x(start), 30, fate, tip)
            if x(1) - x(0) >= 5:
                seams = "".join(f"M{num(x(i))} {num(y)}v30" for i in range(1, total))
                c.path(seams, "seam")
            y += 30 + 16
        y -= 16
        ticks = [t for t in round_ticks(0, total, 8 if c.width == WIDE else 4, whole=True) if t <= total]
        draw_ticks_below(c, x, ticks, tick_labels(ticks, "auto"), y + 3)
        c.paragraph(0, y + 20, wrap(position_label, gutter - 10, 11), "muted", size=11)
        y += 42
        for name in lanes:
            rows = wrap(name, gutter - 10, 11)
            c.paragraph(0, y + 4, rows, "", size=11)
            c.line(gutter, y, c.width - 1, y, "grid")
            for start, end, owner in segments:
                if owner == name:
                    a, b = x(start) + 0.75, max(x(end) - 0.75, x(start) + 1.5)
                    tip = f"{name}: {start:,} to {end - 1:,} ({end - start:,} tokens)"
                    c.path(f"M{num(a)} {num(y - 5)}V{num(y)}H{num(b)}V{num(y - 5)}", "bracket", tip)
            y += 15 * (len(rows) - 1) + 19
        c.height = y - 8

    data = _atoms(filled, segments)
    said = "; ".join(f"{arm}: " + ", ".join(f"{n} {fate}" for fate, n in by.items()) for arm, by in counts.items())
    return make_figure(title, caption, data, {}, draw if total and strips else None, f"Of {total} positions, {said}.")


def request_strips(
    requests: Mapping[str, Sequence[Span]], *, title: str, caption: str = "", position_label: str = "position"
) -> Figure:
    """Several requests under each other on one axis of positions: what was computed of each, and what was reused.

    Args:
        requests: by name, spans as in `token_strip`. What stands after the last span of a request is no gap: requests
            differ in length.
    """
    for name, spans in requests.items():
        _check_fates(spans, f"request {name!r}")
    total = max([end for spans in requests.values() for _, end, _ in spans], default=0)
    filled = {name: _fill_gaps(spans, max([e for _, e, _ in spans], default=0)) for name, spans in requests.items()}
    fates = [f for f in (*FATES, NO_RECORD) if any(f == fate for spans in filled.values() for _, _, fate in spans)]
    counts = {name: _tokens_by_name(spans) for name, spans in filled.items()}

    def draw(c: Canvas) -> None:
        gutter = min(max(map(text_width, [*requests, position_label])) + 12, 0.34 * c.width)
        x = Scale(0, total, gutter, c.width - 12)
        y = _draw_fate_key(c, [(FATES_IN_WORDS[f], f) for f in fates], 11, 0) + 12
        for name, spans in filled.items():
            rows = wrap(name, gutter - 10)
            c.paragraph(0, y + 12 - 7.5 * (len(rows) - 1), rows)
            for start, end, fate in spans:
                tip = f"{name}: {start:,} to {end - 1:,} {fate} ({end - start:,} tokens)"
                _draw_fate(c, x(start), y, x(end) - x(start), 17, fate, tip)
            y += 15 * max(len(rows) - 1, 0) + 23
        ticks = [t for t in round_ticks(0, total, 8 if c.width == WIDE else 4, whole=True) if t <= total]
        draw_ticks_below(c, x, ticks, tick_labels(ticks, "auto"), y)
        c.paragraph(0, y + 17, wrap(position_label, gutter - 10, 11), "muted", size=11)
        c.height = y + 22

    frame = _atoms(filled, []).rename(columns={"arm": "request"}).drop(columns="segment")
    said = "; ".join(f"{name}: " + ", ".join(f"{n} {fate}" for fate, n in by.items()) for name, by in counts.items())
    return make_figure(title, caption, frame, {}, draw if total else None, f"{said}.")


def _check_fates(spans: Sequence[Span], what: str) -> None:
    _check_spans(spans, what)
    unknown = {s for _, _, s in spans} - set(FATES)
    if unknown:
        raise ValueError(f"{what} has the unknown fate {sorted(unknown)[0]!r}; known: {', '.join(FATES)}")


def _draw_fate(c: Canvas, x: float, y: float, w: float, h: float, fate: str, tip: str = "") -> None:
    """A run of tokens in the look of its fate: solid if an activation exists, hatched if none was computed."""
    match fate:
        case "computed":
            c.rect(x, y, w, h, "s1 fill", tip=tip)
        case "decode":
            c.rect(x, y, w, h, "s7 fill", tip=tip)
        case "reused" | "dropped":
            hue = "s2" if fate == "reused" else "s3"
            c.rect(x, y, w, h, f"{hue} pale", tip=tip)
            c.hatch(x, y, w, h, f"{hue} hatch", pitch=6.0 if fate == "reused" else 3.0)
            c.rect(x + 0.5, y + 0.5, max(w - 1, 0.2), h - 1, f"{hue} outline")
        case "unrequested":
            c.rect(x + 0.5, y + 0.5, max(w - 1, 0.2), h - 1, "blank", tip=tip)
        case _:
            c.rect(x + 0.5, y + 0.5, max(w - 1, 0.2), h - 1, "gap", tip=tip)


def _draw_fate_key(c: Canvas, items: Sequence[tuple[str, str]], y: float, x: float) -> float:
    """Swatches with counts, wrapped; `y` is the first baseline. Gives the last baseline."""
    first = x
    for text, fate in items:
        width = text_width(text, 11) + 17
        if x > first and x + width > c.width + 0.5:
            x, y = first, y + 17
        _draw_fate(c, x, y - 9.5, 11, 11, fate)
        c.text(x + 17, y, text, "muted", size=11)
        x += width + 16
    return y


def _check_spans(spans: Sequence[Span], what: str) -> None:
    before = 0
    for start, end, name in sorted(spans):
        if start < before or end <= start:
            raise ValueError(f"{what}: span [{start}, {end}) {name!r} is empty, negative, or overlaps the one before")
        before = end


def _fill_gaps(spans: Sequence[Span], total: int) -> list[Span]:
    filled: list[Span] = []
    at = 0
    for start, end, fate in sorted(spans):
        if start > at:
            filled.append((at, start, NO_RECORD))
        filled.append((start, end, fate))
        at = end
    return filled if at == total else [*filled, (at, total, NO_RECORD)]


def _tokens_by_name(spans: Iterable[Span]) -> dict[str, int]:
    counts = dict.fromkeys((*FATES, NO_RECORD), 0)
    for start, end, name in spans:
        counts[name] += end - start
    return {name: n for name, n in counts.items() if n}


def _atoms(strips: Mapping[str, Sequence[Span]], segments: Sequence[Span]) -> pd.DataFrame:
    """Spans cut at segment borders: every run of tokens with one arm, one segment and one fate."""
    rows = []
    for arm, spans in strips.items():
        for start, end, fate in spans:
            cuts = sorted({start, end, *(p for a, b, _ in segments for p in (a, b) if start < p < end)})
            for a, b in pairwise(cuts):
                name = next((n for s, e, n in segments if s <= a < e), "")
                rows.append((arm, a, b, b - a, name, fate))
    return pd.DataFrame(rows, columns=["arm", "start", "end", "tokens", "segment", "fate"])
