"""The graph in rows and columns: every node and edge is drawn once, and what has no room is said."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from sglang_probe.report.figures import layered_graph

ROWS = ["tokens", "layer 1", "answer"]


def nodes(columns: int = 3) -> pd.DataFrame:
    records = [
        (f"n{i}", "layer 1", i, "feature" if i % 2 else "error", float(i - 1), f"f{i}", "tip") for i in range(columns)
    ]
    records.append(("out", "answer", columns - 1, "output", 2.0, "", "the answer"))
    return pd.DataFrame(records, columns=["node", "row", "column", "kind", "value", "short", "tip"])


def edges(*pairs: tuple[str, str, float]) -> pd.DataFrame:
    return pd.DataFrame(pairs, columns=["source", "target", "value"])


def test_nodes_and_edges_between_them_are_drawn_and_others_are_not() -> None:
    figure = layered_graph(
        nodes(), edges(("n0", "out", -1.0), ("n1", "gone", 1.0)), ROWS, {0: "The", 2: " <b>"}, title="t"
    )
    for svg in (figure.svg, figure.svg_narrow):
        assert len(re.findall(r'class="s[13] dot"', svg)) == 4
        assert re.findall(r'class="(s[13] edge w\d)"', svg) == ["s3 edge w3"]
        assert "·&lt;b&gt;" in svg
        assert "no room" not in svg
    assert figure.formats["value"] == "signed"


def test_columns_without_room_are_those_of_the_smallest_nodes_and_are_counted() -> None:
    figure = layered_graph(nodes(40), edges(), ROWS, {i: str(i) for i in range(40)}, title="t")
    assert "more positions have no room here" in figure.svg
    assert ">39</text>" in figure.svg
    assert ">1</text>" not in figure.svg  # its node is 0
    assert len(figure.data) == 41


def test_nothing_is_drawn_as_nothing() -> None:
    figure = layered_graph(nodes().iloc[:0], edges(), ROWS, {}, title="t")
    assert not figure.drawn


def test_a_node_twice_and_a_row_that_is_not_named_are_refused() -> None:
    with pytest.raises(ValueError, match="there twice"):
        layered_graph(pd.concat([nodes(), nodes()]), edges(), ROWS, {}, title="t")
    with pytest.raises(ValueError, match="no row 'layer 1'"):
        layered_graph(nodes(), edges(), ["tokens", "answer"], {}, title="t")
