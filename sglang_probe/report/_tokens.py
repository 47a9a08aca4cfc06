"""A map of tokens: a cell for each position and layer, with the token that is most likely there.

Unlike the other figures it is a table of text: it is wider than any screen, is scrolled sideways below its first
column, and every cell can be copied and read out.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from markupsafe import escape

from sglang_probe.report._figure import Figure
from sglang_probe.report.numbers import Kind, format_number

_MOST_OPACITY = 0.65
"""Of a cell that is certain: text in the page's ink has a contrast of 5 on it, in light and in dark."""
_LETTERS = 12


def visible(token: str) -> str:
    """Text of a token with its white space shown: `·` a space, `⏎` a new line, `⇥` a tab; long runs are cut."""
    shown = token.replace(" ", "·").replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")
    return shown if len(shown) <= _LETTERS else shown[: _LETTERS - 1] + "…"


def token_map(
    frame: pd.DataFrame,
    row: str,
    column: str,
    text: str,
    shade: str,
    *,
    title: str,
    caption: str = "",
    heads: Sequence[str],
    marked: str | None = None,
    tip: str | None = None,
    kind: Kind = "percent",
) -> Figure:
    """Cells with a token each, shaded by a share in 0 to 1; the frame's rows in the order in which they are shown.

    Args:
        text: column with the token of a cell.
        heads: what stands above each column, as many as there are columns.
        marked: bool column of cells that are set in bold.
        tip: column with what is told of a cell where the pointer rests on it.

    Raises:
        ValueError: a cell twice, or as many heads as there are columns are not given.
    """
    wanted = list(dict.fromkeys([row, column, text, shade, *(c for c in (marked, tip) if c)]))
    if missing := [c for c in wanted if c not in frame.columns]:
        raise ValueError(f"no column {missing[0]!r}; the frame has {', '.join(map(str, frame.columns))}")
    data = frame[wanted]
    if data.duplicated([row, column]).any():
        raise ValueError(f"a cell of {row} and {column} is there twice")
    rows, columns = list(dict.fromkeys(data[row])), list(dict.fromkeys(data[column]))
    if len(heads) != len(columns):
        raise ValueError(f"{len(heads)} heads for {len(columns)} columns")
    formats: dict[str, Kind] = {shade: kind}
    numbers = data.drop(columns=[tip] if tip else [])
    if data.empty:
        return Figure(title, caption, "", "", numbers, formats, drawn=False)
    cells = {(r[0], r[1]): r[2:] for r in data.itertuples(index=False, name=None)}
    place = {name: i for i, name in enumerate(wanted[2:])}
    over = zip(columns, heads, strict=True)
    head = "".join(f'<th scope="col"><small>{escape(c)}</small>{escape(visible(h))}</th>' for c, h in over)
    body = []
    for r in rows:
        line = [f'<th scope="row">{escape(r)}</th>']
        for c in columns:
            found = cells.get((r, c))
            if found is None:
                line.append('<td class="none"></td>')
                continue
            share = min(max(float(found[place[shade]]), 0.0), 1.0)
            css = ' class="is"' if marked and found[place[marked]] else ""
            said = f' title="{escape(found[place[tip]])}"' if tip else ""
            style = f"background:rgb(0 114 178/{_MOST_OPACITY * share:.2f})"
            line.append(f'<td{css}{said} style="{style}">{escape(visible(str(found[place[text]])))}</td>')
        body.append(f"<tr>{''.join(line)}</tr>")
    bottom, top = format_number(0.0, kind), format_number(1.0, kind)
    ramp = "".join(f'<i style="background:rgb(0 114 178/{_MOST_OPACITY * i / 8:.2f})"></i>' for i in range(9))
    html = (
        f'<div class="scroll tokens" tabindex="0" role="region" aria-label="{escape(title)}">\n<table>\n'
        f'<thead><tr><th scope="col">{escape(row.replace("_", " "))}</th>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + f'\n</tbody>\n</table>\n</div>\n<p class="ramp">{bottom} {ramp} {top}</p>'
    )
    return Figure(title, caption, html, "", numbers, formats)
