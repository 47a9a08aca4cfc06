"""The SQL of the how-to reads a run directory, and says what the frames say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.run.run import Run

duckdb: Any = pytest.importorskip("duckdb", reason="DuckDB, the extra [query], is not installed")
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "sql-over-ledgers.md"
QUERIES = dict(
    re.findall(r"^## (.*?)\n.*?^```sql\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
)
ALL = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def ask(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.chdir(make_run().path)
    return lambda query: duckdb.sql(query).df()


def test_every_query_of_the_page_is_answered(ask: Callable[[str], Any]) -> None:
    assert len(ALL) == 6
    for query in ALL:
        assert len(ask(query)), query


def test_positions_are_those_of_the_frame(ask: Callable[[str], Any], make_run: Callable[..., Run]) -> None:
    once = ask(ALL[1]).set_index("status")["positions"]
    tokens = make_run("again").tokens()
    tokens = tokens[tokens["phase"] != "overshoot"]
    assert once.to_dict() == tokens.groupby("status")["position"].size().to_dict()


def test_the_row_of_a_reused_position_is_its_origins(ask: Callable[[str], Any], make_run: Callable[..., Run]) -> None:
    found = ask(QUERIES["Which row belongs to a position"])
    assert found[["rid", "computed_by", "start"]].to_numpy().tolist() == [["b", "a", 0]]
    tokens = make_run("again").tokens_of("b")
    assert found["first_row"].tolist() == tokens["source_row"].head(1).tolist()
