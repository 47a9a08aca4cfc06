"""An SVG drawing built up element by element, and text measured without a browser.

A `Canvas` has a fixed width and grows downwards, so whoever draws decides where rows break: `text_width` and `wrap`
estimate that from the characters. `Canvas` escapes every text, tip and title, so callers pass them as they are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from markupsafe import escape

WIDE, NARROW = 720, 340


class Canvas:
    """SVG elements of one drawing, added from top to bottom; `height` is set last."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.height = 0.0
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start", size: int = 12) -> None:
        attributes = f' class="{css}"' if css else ""
        attributes += f' text-anchor="{anchor}"' if anchor != "start" else ""
        attributes += f' font-size="{size}"' if size != 12 else ""
        self._parts.append(f'<text x="{num(x)}" y="{num(y)}"{attributes}>{_escape(text)}</text>')

    def paragraph(
        self, x: float, y: float, rows: Sequence[str], css: str = "", anchor: str = "start", size: int = 12
    ) -> None:
        for i, row in enumerate(rows):
            self.text(x, y + 15 * i, row, css, anchor, size)

    def rect(
        self, x: float, y: float, w: float, h: float, css: str, *, tip: str = "", opacity: float | None = None
    ) -> None:
        shade = "" if opacity is None else f' fill-opacity="{num(opacity)}"'
        self._add("rect", f'x="{num(x)}" y="{num(y)}" width="{num(w)}" height="{num(h)}"{shade}', css, tip)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self._add("path", f'd="M{num(x1)} {num(y1)}L{num(x2)} {num(y2)}"', css)

    def path(self, d: str, css: str, tip: str = "") -> None:
        self._add("path", f'd="{d}"', css, tip)

    def circle(self, x: float, y: float, r: float, css: str, tip: str = "") -> None:
        self._add("circle", f'cx="{num(x)}" cy="{num(y)}" r="{num(r)}"', css, tip)

    def mark(self, x: float, y: float, index: int, css: str, tip: str = "") -> None:
        """The mark of a series: shapes differ as colours do, for readers who do not tell the colours apart."""
        match index % 4:
            case 0:
                self.circle(x, y, 3.5, css, tip)
            case 1:
                self.path(f"M{num(x - 3.2)} {num(y - 3.2)}h6.4v6.4h-6.4Z", css, tip)
            case 2:
                self.path(f"M{num(x)} {num(y - 4.6)}l4.6 4.6l-4.6 4.6l-4.6 -4.6Z", css, tip)
            case _:
                self.path(f"M{num(x)} {num(y - 4.4)}l4.4 7.6h-8.8Z", css, tip)

    def hatch(self, x: float, y: float, w: float, h: float, css: str, *, tip: str = "", pitch: float = 6.0) -> None:
        """Diagonal strokes cut to the box, one by one: an SVG pattern would need a reference, and the page has none."""
        strokes = []
        offset = (x + y) % pitch  # strokes of neighbouring boxes line up
        at = pitch - offset
        while at < w + h:
            x1, x2 = max(0.0, at - h), min(w, at)
            if x2 - x1 > 0.3:
                strokes.append(f"M{num(x + x1)} {num(y + at - x1)}L{num(x + x2)} {num(y + at - x2)}")
            at += pitch
        if strokes:
            self.path("".join(strokes), css, tip)

    def legend(self, items: Sequence[tuple[str, str]]) -> float:
        """Swatches with names at the top, wrapped. Gives the y below."""
        x = y = 0.0
        for name, css in items:
            rows = wrap(name, self.width - 18)
            width = max(map(text_width, rows)) + 18
            if x and x + width > self.width:
                x, y = 0.0, y + 18
            if "stroke" in css:
                self.line(x, y + 6.5, x + 12, y + 6.5, css)
            else:
                self.rect(x, y + 1, 11, 11, css)
            self.paragraph(x + 18, y + 11, rows)
            y += 15 * (len(rows) - 1)
            x += width + 20
        return y + 28

    def svg(self, css: str, title: str, description: str) -> str:
        named = _escape(re.sub(r"`|[*][*]", "", title))
        head = f'<svg class="{css}" viewBox="0 0 {self.width} {num(self.height)}" role="img" aria-label="{named}" '
        head += f'font-size="12"><title>{named}</title><desc>{_escape(description)}</desc>'
        return "\n".join([head, *self._parts, "</svg>"])

    def _add(self, tag: str, attributes: str, css: str, tip: str = "") -> None:
        inner = f"><title>{_escape(tip)}</title></{tag}>" if tip else "/>"
        self._parts.append(f'<{tag} class="{css}" {attributes}{inner}')


def text_width(text: str, size: int = 12, bold: bool = False) -> float:
    """Estimated width in px for Arial-like fonts, a little generous so that no label is cut."""
    units = 0.0
    for ch in text:
        if unicodedata.east_asian_width(ch) in "WF":
            units += 1.0
        elif ch in "ijl|'!.,:;I[]() ftr/\\":
            units += 0.3
        elif ch in "mwMW@%":
            units += 0.87
        else:
            units += 0.7 if ch.isupper() else 0.56
    return units * size * (1.1 if bold else 1.04)


def wrap(text: str, width: float, size: int = 12, bold: bool = False) -> list[str]:
    """Rows no wider than `width`, broken after spaces and the joints of names, or inside a word that is too long."""
    rows = [""]
    for piece in re.findall(r"[^\s._/\-]*[\s._/\-]*", text):
        if rows[-1] and text_width((rows[-1] + piece).rstrip(), size, bold) > width:
            rows.append("")
        rows[-1] += piece
        while len(rows[-1]) > 1 and text_width(rows[-1].rstrip(), size, bold) > width:
            fit = len(rows[-1]) - 1
            while fit > 1 and text_width(rows[-1][:fit], size, bold) > width:
                fit -= 1
            rows[-1:] = [rows[-1][:fit], rows[-1][fit:]]
    return [row.strip() for row in rows]


def num(x: float) -> str:
    """A number for SVG attributes: two decimals, no trailing zeros."""
    text = f"{x:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def series_class(index: int) -> str:
    """The colour of a series: six in turn, defined in page.html.j2."""
    return f"s{index % 6 + 1}"


def mark_class(index: int) -> str:
    """The colour of a series that is told apart by marks or bands: without the grey, which is for what is compared."""
    return ("s1", "s3", "s4", "s5", "s6", "s2")[index % 6]


def _escape(text: str) -> str:
    """Escaped for XML, without the control characters that XML forbids."""
    return str(escape("".join(ch for ch in text if ch >= " " or ch in "\t\n")))
