"""A request that does what the ledger does not expect costs its own record, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify
from tests.engine.live.conftest import EMBEDDING, FakeEngine, checked, notes, violations

A, B = [1, 2, 3, 4], [11, 12, 13, 14, 15]


@pytest.mark.parametrize("rows", [False, True])
def test_a_position_that_does_not_follow_loses_its_request_and_nobody_elses(
    make_engine: Callable[..., FakeEngine], rows: bool
) -> None:
    engine = make_engine(rows=rows, privacy="ids", drops=not rows)
    engine.prefill("good", A)
    engine.prefill("odd", B)
    engine.decode("odd", "good", n=2)
    engine.tokens["odd"].append(98)  # SGLang goes on two positions later
    engine.decode("odd", "good", n=2)
    engine.end("odd", "good")
    engine.serve("later", [*A, 5], reused=4)
    engine.serve("again", [*B, 5], reused=5)
    run = load_run(engine.flush())
    checks = verify(run, embedding=EMBEDDING) if rows else verify(run)
    assert violations(checks) == []
    requests = run.requests().set_index("rid")
    assert requests["finish_reason"].to_dict() == {
        "good": "length",
        "odd": "unaccounted",
        "later": "length",
        "again": "length",
    }
    spans = run.spans()
    odd = spans[spans["rid"] == "odd"].sort_values("start")
    assert odd["status"].tolist() == ["computed", "computed", "dropped"]
    assert odd["end"].iloc[-1] == requests.at["odd", "prompt_len"] + requests.at["odd", "output_len"] - 1
    assert "decode of position 8" in run.manifest["unaccounted"]["odd"]
    assert run.forwards()["unaccounted"].sum() == 3
    assert engine.live.status()["requests_unaccounted"] == 1
    assert engine.live.status()["recording"]
    assert "1 requests could not be accounted for" in notes(checks)
    if rows:
        captured = spans[(spans["status"] == "computed") & (spans["row_start"] >= 0)]
        assert run.manifest["rows"] == int((captured["end"] - captured["start"]).sum())


def test_a_forward_of_more_rows_than_positions_loses_its_requests(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine()
    engine.serve("before", A)
    engine.prefill("odd", B)
    engine.unexplained = "more rows than positions"
    engine.decode("odd")
    engine.unexplained = None
    engine.end("odd")
    engine.serve("after", [7, 8, 9])
    run, checks = checked(engine.flush())
    assert violations(checks) == []
    assert run.manifest["requests_by_finish"] == {"length": 2, "unaccounted": 1}
    assert run.manifest["unaccounted"] == {"odd": "more rows than positions"}


def test_what_an_unaccounted_request_leaves_in_the_cache_has_no_owner(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine()
    engine.serve("first", B)
    engine.unexplained = "?"  # SGLang has evicted what the first left, and the odd one puts the same tokens there again
    engine.prefill("odd", B)
    engine.unexplained = None
    engine.serve("reader", [*B, 1], reused=5)
    run = load_run(engine.flush())
    reused = run.spans().query("status == 'reused'")
    assert reused["origin_rid"].isna().all()


def test_the_rows_of_a_lost_request_are_cut_out_of_selected_ones_too() -> None:
    """Of a hook point that holds some positions only, the index counts the rows that are left."""
    import torch

    from sglang_probe.engine.ledger.facts import Commit, ForwardPlan, cut

    plan = ForwardPlan(1, "extend", ["a", "b", "c"], [0, 0, 0], [2, 3, 2], [False] * 3, [0] * 3, [2, 3, 2], [], 7)
    commit = Commit(
        rows={"all": torch.arange(7), "some": torch.tensor([1, 3, 5])}, selected={"some": np.array([1, 3, 5])}
    )
    cut(commit, plan, [1])
    assert commit.rows is not None
    assert commit.rows["all"].tolist() == [0, 1, 5, 6]
    assert commit.rows["some"].tolist() == [1, 5]
    assert commit.selected["some"].tolist() == [1, 2]
