"""The study of causes: planted ones are at the top of what is to be done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_probe.cli import app
from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.studies.why.page import answer
from sglang_probe.studies.why.study import why
from tests.small_cache import SmallCache

A = list(range(100, 200))
B = list(range(300, 360))
C = list(range(400, 460))
D = list(range(600, 700))


def planted(path: Path) -> Path:
    """Another order in family `order`, a cache that is too small for `small`, another page in `page`."""
    cache = SmallCache(path)
    cache.serve("order0", [1, *A, *B, *C], segments=[("system", 101), ("tools", 221)])
    cache.serve("order1", [1, *A, *C, *B], segments=[("system", 101), ("tools", 221)])
    cache.serve("small0", [2, *D], segments=[("system", 101)])
    cache.evict([2, *D], 0)
    cache.serve("small1", [2, *D], segments=[("system", 101)])
    cache.close()
    return path


def test_planted_causes_are_named_with_what_they_cost(tmp_path: Path) -> None:
    result = why(planted(tmp_path / "run"))
    saved = {r.what: r.tokens for r in result.remedies.itertuples()}
    assert saved == {"diverged: another order": 120, "evicted": 100}
    assert result.computed == sum(result.causes["tokens"])
    by = {(r.segment, r.cause): r.tokens for r in result.by_segment.itertuples()}
    assert by["tools", "diverged"] == 120
    assert by["system", "evicted"] == 100
    assert dict(zip(result.by_group["group"], result.by_group["mostly"], strict=True)) == {
        "small": "evicted",
        "order": "diverged",
    }


def test_one_request_is_explained(tmp_path: Path) -> None:
    result = why(planted(tmp_path / "run"), rid="order1")
    assert result.computed == 120
    assert set(result.pieces["nearest"]) == {"order0"}
    with pytest.raises(RunDirectoryError, match="no request `nobody`") as refused:
        why(tmp_path / "run", rid="nobody")
    assert refused.value.fix == "it has `order0`, `order1`, `small0`, `small1`"


def test_a_later_segment_counts_what_it_never_saw_neither_as_new_nor_as_computed_again(tmp_path: Path) -> None:
    file = planted(tmp_path / "run") / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "segment": {"number": 3}}))
    result = why(tmp_path / "run")
    assert "never seen" not in set(result.causes["cause"])
    assert result.by_group["avoidable"].tolist() == [120, 100]
    assert any("earlier segments" in note.lower() for note in result.notes)
    first = why(tmp_path / "run", rid="small0")
    assert "as far as this segment knows" in answer(first)


def test_the_command_writes_page_and_json(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["why", str(planted(tmp_path / "run")), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["causes"]["evicted"] == 100
    page = (tmp_path / "run" / "why" / "report.html").read_text()
    assert "always in the same order" in page


def test_an_axis_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no axis `client`"):
        why(planted(tmp_path / "run"), by="client")


def test_requests_are_grouped_by_the_labels_that_they_carry(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", A, labels={"session": "one"})
    cache.evict(A, 50)
    cache.serve("b", A, labels={"session": "two", "tenant": "acme"})
    cache.close()
    groups = why(tmp_path / "run", by="session").by_group.set_index("group")
    assert groups.loc["two", "avoidable"] == 49
    assert groups.loc["one", "avoidable"] == 0
    assert set(why(tmp_path / "run", by="tenant").by_group["group"]) == {"acme", "(none)"}
