"""Coverage of closed segments of a live recording, with token ids and without."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import load_run
from sglang_probe.studies.coverage.study import study_coverage
from tests.engine.live.conftest import FakeEngine, make_engine, wait

__all__ = ["make_engine", "wait"]

A, B = [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("privacy", ["none", "hashes"])
def test_without_token_ids_what_needs_them_is_named_and_the_rest_is_there(
    make_engine: Callable[..., FakeEngine], privacy: str
) -> None:
    engine = make_engine(privacy=privacy)
    engine.serve("a", A)
    engine.serve("b", B, reused=4)
    run = load_run(engine.flush())
    found = study_coverage(run, ["segment", "phase", "lexical", "repeat"], by="position")
    assert sorted(found.missing_axes) == ["lexical", "repeat"]
    assert [m.name for m in found.maps] == ["segment", "phase", "segment x position", "phase x position"]
    classes = found.map("segment").classes.set_index("segment")
    assert classes.loc["prompt", ["positions", "computed", "reused"]].tolist() == [10, 6, 4]
    assert classes.loc["generated", "coverage"] == 1
    assert classes["contexts"].isna().all()
    assert any("No token ids" in note for note in found.notes)
    with pytest.raises(ConfigError, match="kept none"):
        study_coverage(run, ["repeat"])


def test_with_token_ids_contexts_are_known(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine(privacy="ids")
    engine.serve("a", A)
    engine.serve("b", B, reused=4)
    found = study_coverage(load_run(engine.flush()), ["segment"])
    classes = found.map("segment").classes.set_index("segment")
    assert classes["contexts"].to_dict() == {"prompt": 6, "generated": 4}
    assert found.families.startswith("prefix families by lineage")
    assert found.totals["families"] == 1


def test_a_request_over_a_border_is_counted_in_both_segments_and_its_contexts_in_none(
    make_engine: Callable[..., FakeEngine],
) -> None:
    engine = make_engine(privacy="ids", segments={"patience": 0})
    engine.prefill("a", A)
    engine.decode("a", n=2)
    first = load_run(engine.flush())
    engine.decode("a", n=3)
    engine.end("a")
    engine.serve("b", B, reused=4)
    second = load_run(engine.flush())
    one, two = study_coverage(first, ["segment", "depth"]), study_coverage(second, ["segment", "depth"])
    assert (one.totals["positions"], two.totals["positions"]) == (6, 4 + 8)
    generated = two.map("segment").classes.set_index("segment").loc["generated"]
    assert (generated["positions"], generated["computed"]) == (4 + 2, 6)
    assert any("leave out 4 positions" in note for note in two.notes)
    assert two.totals["contexts"] == 8
    assert two.totals["contexts_in_run"] == 4, "its prompt was computed in the segment before"


def test_an_origin_in_an_earlier_segment_is_not_in_this_run(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine(privacy="ids")
    engine.serve("a", A)
    engine.flush()
    engine.serve("b", B, reused=4)
    found = study_coverage(load_run(engine.flush()), ["segment"])
    prompt = found.map("segment").classes.set_index("segment").loc["prompt"]
    assert (prompt["contexts"], prompt["contexts_in_run"]) == (6, 2)
    assert any("outside this run's traffic" in note for note in found.notes)
