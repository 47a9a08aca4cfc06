"""A page of results as one HTML file: the answer in a sentence, the picture that shows it, then the evidence.

The file needs nothing but itself: no script, no font, no image, and its content security policy forbids loading any.
All text is escaped; the only markup understood is `code` in backquotes and **bold**.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from sglang_probe.report.figures import Figure
from sglang_probe.report.tables import MOST_ROWS, Table

TABLES = "tables"
"""Folder of a study's tables, beside its page."""


@dataclass(frozen=True)
class Tile:
    """One headline number: what it is, the number as text, and what it means in a short sentence."""

    label: str
    value: str
    explanation: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what belongs to it. `text`: paragraphs, separated by blank lines; `notes`: caveats, small.

    Figures and tables without a number are replaced by one sentence: nothing to show, because of `nothing`.
    """

    heading: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    nothing: str = "nothing of it was measured"


@dataclass(frozen=True)
class Page:
    """The whole report. `facts` are (name, value) pairs that say what was measured: model, versions, seeds, arms."""

    title: str
    answer: str = ""
    """What was found, in one sentence."""
    picture: Figure | None = None
    """The figure that shows the answer; left out where there is nothing to draw."""
    lead: str = ""
    """How it was measured."""
    tiles: Sequence[Tile] = ()
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = ()
    footer: str = ""


def render(page: Page, folder: Path | None = None) -> str:
    """The page as one HTML document, with links to those files of its tables that `folder` has."""

    def files_of(table: str) -> list[str]:
        if not table or folder is None:
            return []
        return [n for n in (f"{TABLES}/{table}.{suffix}" for suffix in ("csv", "parquet")) if (folder / n).is_file()]

    return _environment().get_template("page.html.j2").render(page=page, files_of=files_of)


def write(page: Page, path: Path | str) -> None:
    """Render to `path`; a reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    html = render(page, path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def inline(text: str) -> Markup:
    """Escaped text in which `code` and **bold** are marked up."""
    plain, *rest = re.split(r"`([^`\n]+)`|\*\*(?=\S)(.+?)(?<=\S)\*\*", text)
    html = escape(plain)
    for code, bold, after in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        html += Markup("<code>{}</code>").format(code) if code else Markup("<strong>{}</strong>").format(bold)
        html += escape(after)
    return html


def paragraphs(text: str) -> Markup:
    """Blank lines separate paragraphs."""
    blocks = [b.strip() for b in re.split(r"\n\s*\n", text) if b.strip()]
    return Markup("\n").join(Markup("<p>{}</p>").format(inline(b)) for b in blocks)


def _split(section: Section) -> dict[str, list[Any]]:
    """Figures and tables with numbers, and what the others would have shown."""
    empty = [f.title for f in section.figures if not f.drawn] + [t.caption for t in section.tables if t.frame.empty]
    return {
        "figures": [f for f in section.figures if f.drawn],
        "tables": [t for t in section.tables if not t.frame.empty],
        "empty": [e for e in empty if e],
    }


def _csv_link(frame: pd.DataFrame) -> str:
    """The frame at full precision, as a link that holds its own data."""
    return "data:text/csv;charset=utf-8," + quote(frame.to_csv(index=any(n is not None for n in frame.index.names)))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(inline=inline, paragraphs=paragraphs, csv_link=_csv_link, split=_split)
    environment.globals.update(Table=Table, MOST_ROWS=MOST_ROWS)
    return environment
