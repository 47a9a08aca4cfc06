"""Markdown that holds text from elsewhere: workloads, users' names and file names never become markup.

Entities are used, because every renderer of Markdown decodes them outside of code spans and none reads them as markup.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PLAIN = re.compile(r"[A-Za-z0-9.,:;/+()=@%{}'\"-][A-Za-z0-9_.,:;/+()=@%{}'\" -]*")


def escape(text: object) -> str:
    """One line of text whose every sign stands for itself, in running text and in a cell of a table."""
    return "".join(_entity(ch) for ch in " ".join(str(text).split()))


def code(text: object) -> str:
    """The text as code: in backquotes where it is harmless, else as an element whose content is escaped."""
    plain = str(text)
    if _PLAIN.fullmatch(plain) and plain == plain.strip():
        return f"`{plain}`"
    return f"<code>{escape(plain)}</code>"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: int = 0) -> str:
    """A table whose last `numeric` columns are aligned right. Cells are Markdown: of `escape`, `code`, or numbers."""
    rule = "|" + "---|" * (len(headers) - numeric) + "---:|" * numeric
    return "\n".join(["| " + " | ".join(headers) + " |", rule, *("| " + " | ".join(r) + " |" for r in rows)])


def _entity(ch: str) -> str:
    if ch in "&<>|`*_[]()\\~#!$^=" or (ch < " "):
        return f"&#{ord(ch)};" if ch >= " " else ""
    return ch
