"""Numbers never claim more than they are; tables hold every value, escaped."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from sglang_probe.report.numbers import MISSING, Kind, format_number
from sglang_probe.report.tables import MOST_ROWS, Column, Table


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.08, "percent", "8.0%"),
        (1.0, "percent", "100%"),
        (0, "percent", "0%"),
        (0.99970, "percent", ">99.9%"),
        (0.0003, "percent", "<0.1%"),
        (-0.0003, "percent", ">-0.1%"),
        (1.0003, "percent", ">100%"),
        (1.5, "percent", "150.0%"),
        (-0.25, "percent", "-25.0%"),
        (sum([0.1] * 10), "percent", "100%"),  # 0.9999999999999999: rounding of the mean, not a missing token
        (1284032, "integer", "1,284,032"),
        (np.int64(1284032), "auto", "1,284,032"),
        (2**60 + 1, "auto", "1,152,921,504,606,846,977"),
        (3.7, "integer", "3.7"),
        (4.0, "integer", "4"),
        (0.62, "decimal", "0.620"),
        (0.00003, "decimal", "3.00e-5"),
        (0.0, "decimal", "0.000"),
        (-0.0, "decimal", "0.000"),
        (3.14159e-8, "auto", "3.14e-8"),
        (np.float32(0.5), "auto", "0.5"),
        (0.123456, "auto", "0.1235"),
        (1234.56, "auto", "1,235"),
        (0.0, "scientific", "0"),
        (4.2e-7, "scientific", "4.20e-7"),
        (1234567, "text", "1234567"),
        (0.5, "signed", "+0.500"),
        (-0.25, "signed", "-0.250"),
        (-0.0001, "signed", "-0.000"),  # the sign of an end of an interval is what it is read for
        (0.0, "signed", "0.000"),
        (0.845, "correlation", "+0.84"),
        (-20.04, "points", "-20.0"),
        (6.04, "seconds", "6.0"),
        (0.0004, "seconds", "4.00e-4"),
        (389.6, "rate", "390"),
        (1.934, "times", "1.93"),
        (28.25, "average", "28.2"),
        ("req-1", "auto", "req-1"),
        (True, "auto", "yes"),
        (np.bool_(False), "auto", "no"),
        (float("inf"), "percent", "∞"),
        (float("-inf"), "auto", "-∞"),
    ],
)
def test_numbers_are_printed_exactly_like_this(value: object, kind: Kind, text: str) -> None:
    assert format_number(value, kind) == text


@pytest.mark.parametrize("value", [None, float("nan"), np.float64("nan"), pd.NA, pd.NaT])
@pytest.mark.parametrize("kind", ["auto", "percent", "text"])
def test_every_kind_of_missing_value_is_an_en_dash(value: object, kind: Kind) -> None:
    assert format_number(value, kind) == MISSING == "\u2013"


def test_digits_narrow_a_percentage_without_rounding_to_the_ends() -> None:
    texts = [format_number(x, "percent", digits=0) for x in (0.0, 0.001, 0.126, 0.999, 1.0)]
    assert texts == ["0%", "<1%", "13%", ">99%", "100%"]


def test_a_table_holds_every_cell_in_order() -> None:
    frame = pd.DataFrame({"arm": ["cache_on", "cache_off"], "tokens": [1200, 99000], "coverage": [0.314, None]})
    cells = _cells(Table(frame, formats={"coverage": "percent"}).to_html())
    assert cells == [
        ["arm", "tokens", "coverage"],
        ["cache_on", "1,200", "31.4%"],
        ["cache_off", "99,000", MISSING],
    ]


def test_numbers_are_aligned_right_and_text_is_not() -> None:
    html = Table(pd.DataFrame({"name": ["a"], "n": [1], "rid": [7]}), formats={"rid": "text"}).to_html()
    assert '<td>a</td><td class="n">1</td><td>7</td>' in html


def test_a_named_index_is_printed_and_an_unnamed_one_is_not() -> None:
    frame = pd.DataFrame({"n": [3]}, index=["left out"])
    assert _cells(Table(frame).to_html()) == [["n"], ["3"]]
    assert _cells(Table(frame.rename_axis("arm")).to_html()) == [["arm", "n"], ["left out", "3"]]


def test_equal_column_names_keep_their_own_values() -> None:
    frame = pd.DataFrame([[1, 2]], columns=["n", "n"])
    assert _cells(Table(frame).to_html()) == [["n", "n"], ["1", "2"]]


def test_numbers_that_belong_together_stand_in_one_cell() -> None:
    frame = pd.DataFrame(
        {"effect": [2e-3, 1e-3, None], "floor": [1e-3, None, 1.0], "low": [-1e-4, None, 0], "high": [2e-4, None, 0]}
    )
    columns = [
        Column("effect", "effect (floor)", "scientific", beside="floor", bounds=("low", "high")),
        Column(header="interval", kind="scientific", bounds=("low", "high")),
    ]
    assert _cells(Table(frame, columns=columns).to_html()) == [
        ["effect (floor)", "interval"],
        ["2.00e-3 (1.00e-3) [-1.00e-4, 2.00e-4]", "[-1.00e-4, 2.00e-4]"],
        ["1.00e-3", MISSING],
        [MISSING, "[0, 0]"],
    ]


def test_columns_are_named_in_words_and_their_dashes_are_no_missing_values() -> None:
    frame = pd.DataFrame({"left_out": ["3–4"], "n": [2]})
    assert _cells(Table(frame, columns=[Column("left_out")]).to_html()) == [["left out"], ["3–4"]]


def test_empty_tables_say_so() -> None:
    assert "no data" in Table(pd.DataFrame()).to_html()
    assert _cells(Table(pd.DataFrame({"a": [], "b": []})).to_html()) == [["a", "b"], ["no data"]]


def test_an_interval_may_be_absent_and_a_number_may_not() -> None:
    frame = pd.DataFrame({"effect": [1e-3]})
    with_interval = Column("effect", kind="scientific", beside="floor", bounds=("low", "high"))
    alone = Column(header="interval", bounds=("low", "high"))
    assert _cells(Table(frame, columns=[with_interval, alone]).to_html()) == [["effect"], ["1.00e-3"]]
    with pytest.raises(ValueError, match="no column 'efect'; the frame has effect"):
        Table(frame, columns=[Column("efect")]).to_html()
    assert _cells(Table(pd.DataFrame(), columns=[Column("a")]).to_html()) == []


def test_rows_that_are_not_shown_are_counted() -> None:
    cells = _cells(Table(pd.DataFrame({"a": range(1, MOST_ROWS + 11)})).to_html())
    assert len(cells) == MOST_ROWS + 2
    assert cells[-1] == [f"{MOST_ROWS} of {MOST_ROWS + 10} rows are shown; the files below have all"]


def test_names_cells_and_caption_are_escaped() -> None:
    evil = '"><script>x</script>'
    html = Table(pd.DataFrame({evil: [evil]}), caption=evil).to_html()
    assert "<script" not in html
    assert _cells(html) == [[evil], [evil]]


def _cells(html: str) -> list[list[str]]:
    parser = _Cells()
    parser.feed(html)
    return parser.rows


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        self._inside = tag in ("td", "th")
        if self._inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data
