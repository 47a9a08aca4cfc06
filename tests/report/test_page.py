"""The page is one file that needs nothing else, escapes everything, and is never half written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest

from sglang_probe.report import (
    Column,
    Page,
    Section,
    Table,
    Tile,
    grouped_bars,
    heatmap,
    lines,
    render,
    token_strip,
    write,
)

EVIL = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def html() -> str:
    return render(_full_page("plain"))


def test_nothing_is_loaded_from_anywhere(html: str) -> None:
    assert not re.search(r"https?:|src=|url\(|@import|<script|<link|<iframe|<img", html)
    assert set(re.findall(r'href="([^",]*)', html)) == {"#s1", "#s2", "#s3", "data:text/csv;charset=utf-8"}


def test_the_content_security_policy_forbids_what_the_page_does_not_need(html: str) -> None:
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in html


def test_markup_in_any_field_of_the_page_stays_text() -> None:
    html = render(_full_page(EVIL))
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 20


def test_each_figure_has_both_drawings_and_is_numbered_in_order(html: str) -> None:
    assert html.count('<svg class="wide"') == html.count('<svg class="narrow"') == 4
    assert re.findall(r'class="number">(\w+ \d)<', html) == ["Figure 1", "Figure 2", "Table 1", "Figure 3", "Figure 4"]


def test_the_numbers_of_each_figure_are_in_its_table() -> None:
    frame = pd.DataFrame({"c": ["a", "b"], "s": ["p", "p"], "v": [0.123, 0.987], "lo": [0.101, 0.955], "hi": [0.2, 1]})
    figure = grouped_bars(frame, "c", "s", "v", title="t", kind="percent", low="lo", high="hi")
    details = _details(render(Page("t", sections=[Section("s", figures=[figure])])))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", details)
    assert cells == ["a", "p", "12.3%", "10.1%", "20.0%", "b", "p", "98.7%", "95.5%", "100%"]


def test_the_download_holds_the_numbers_at_full_precision() -> None:
    frame = pd.DataFrame({"x": [1], "y": [1 / 3]})
    details = _details(render(Page("t", sections=[Section("s", figures=[lines(frame, "x", "y", title="t")])])))
    link = re.search(r'href="data:text/csv;charset=utf-8,([^"]*)"', details)
    assert link is not None
    assert unquote(link[1]) == "x,y\n1,0.3333333333333333\n"


def test_a_long_table_is_folded_away_with_all_its_columns_as_csv() -> None:
    table = Table(pd.DataFrame({"x": [1, 2], "y": [3, 4]}), "every one", columns=[Column("x")], long=True)
    details = _details(render(Page("t", sections=[Section("s", tables=[table])])))
    assert '<span class="number">Table 1</span> every one <span class="size">(2 rows)</span></summary>' in details
    assert re.findall(r"<td[^>]*>(.*?)</td>", details) == ["1", "2"]
    link = re.search(r'href="data:text/csv;charset=utf-8,([^"]*)"', details)
    assert link is not None
    assert unquote(link[1]) == "x,y\n1,3\n2,4\n"


def test_a_page_links_to_the_files_of_its_tables_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "floors.parquet").touch()
    frame = pd.DataFrame({"x": [1]})
    tables = [Table(frame, name, long=True, file=name) for name in ("floors", "absent")]
    write(Page("t", sections=[Section("s", tables=tables)]), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert re.findall(r'href="(tables/[^"]*)"', html) == ["tables/floors.parquet"]
    assert html.count('href="data:text/csv') == 1  # what has no file is embedded
    assert "floors: 1 row, not printed; in tables/floors.parquet." in html


def test_what_is_empty_is_one_sentence_with_its_reason() -> None:
    figure = grouped_bars(pd.DataFrame(), "c", "s", "v", title="bars")
    section = Section("s", figures=[figure], tables=[Table(pd.DataFrame(), "rows")], nothing="no run was named")
    html = render(Page("t", picture=figure, sections=[section]))
    assert "<svg" not in html
    assert "<table" not in html
    for what in ("bars", "rows"):
        assert f"{what}: nothing to show, because no run was named." in html


def test_the_answer_and_its_picture_come_before_everything_else() -> None:
    picture = lines(pd.DataFrame({"x": [1, 2], "y": [1.0, 2.0]}), "x", "y", title="picture")
    html = render(
        Page("t", answer="It is so.", picture=picture, lead="How.", tiles=[Tile("a", "1")], facts=[("b", "c")])
    )
    order = [html.index(x) for x in ("<h1>t", "It is so.", "<svg", 'class="tiles"', "How.", 'class="facts"')]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("`a<b` and **c & d**", "<code>a&lt;b</code> and <strong>c &amp; d</strong>"),
        ("`**not bold**`", "<code>**not bold**</code>"),
        ("2 ** 3 ** 4 and a ` alone", "2 ** 3 ** 4 and a ` alone"),
        ("<b>x</b> [l](javascript:x)", "&lt;b&gt;x&lt;/b&gt; [l](javascript:x)"),
    ],
)
def test_inline_markup_is_code_and_bold_and_nothing_else(text: str, html: str) -> None:
    assert f"<p>{html}</p>" in render(Page("t", lead=text))


def test_blank_lines_separate_paragraphs() -> None:
    assert "<p>one\nstill one</p>\n<p>two</p>" in render(Page("t", sections=[Section("s", "one\nstill one\n \ntwo\n")]))


def test_markup_signs_do_not_reach_the_title_of_the_drawing() -> None:
    figure = token_strip({"on": [(0, 1, "computed")]}, [], title="request `req-1`, **cold**")
    assert "<title>request req-1, cold</title>" in figure.svg


def test_a_page_of_nothing_but_a_title_renders() -> None:
    assert "<h1>only</h1>" in render(Page("only"))


def test_writing_replaces_the_file_under_its_readers_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with path.open() as reader:
        write(Page("new"), path)
        assert reader.read() == "old"
    assert path.read_text(encoding="utf-8") == render(Page("new"))
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(Page("new"), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_reports_need_neither_sglang_nor_torch() -> None:
    code = (
        "import sys; from sglang_probe.report import Page, render; render(Page('t'));"
        "print(*sorted({'sglang', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def _full_page(text: str) -> Page:
    """A page with `text` in every field that takes text."""
    bars = pd.DataFrame({"c": [text], "s": [text], "v": [0.5]})
    curve = pd.DataFrame({"x": [1, 2], "s": [text, "other"], "v": [1.0, 2.0]})
    return Page(
        title=text,
        lead=text,
        tiles=[Tile(text, text, text)],
        facts=[(text, text)],
        sections=[
            Section(
                text,
                text,
                [
                    grouped_bars(bars, "c", "s", "v", title=text, caption=text, unit=text),
                    heatmap(bars, "c", "s", "v", title=text, caption=text, column_label=text),
                ],
                [Table(pd.DataFrame({text: [text]}), text)],
                [text],
            ),
            Section(text, figures=[lines(curve, "x", "v", "s", title=text, x_label=text, y_label=text)]),
            Section(text, figures=[token_strip({text: [(0, 3, "reused")]}, [(0, 3, text)], title=text)]),
        ],
        footer=text,
    )


def _details(html: str) -> str:
    found = re.search(r"<details>.*?</details>", html, re.DOTALL)
    assert found is not None
    return found[0]
