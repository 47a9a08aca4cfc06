"""Causes while a server records: of the open segment, over several, and as counts for `/metrics`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from sglang_probe.engine.live.causes import Causes
from sglang_probe.engine.live.config import LiveConfig
from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.causes import Cause
from sglang_probe.studies.why.live import causes_of
from sglang_probe.studies.why.study import why
from tests.engine.live.conftest import FakeEngine

X = list(range(10, 50))
MOVED = [7, *X]


@pytest.fixture
def engine(make_engine: Callable[..., FakeEngine]) -> FakeEngine:
    """A prompt in the first segment, the same text after another token in the second."""
    engine = make_engine(privacy="ids")
    engine.serve("a", X)
    engine.flush()
    engine.serve("b", MOVED)
    return engine


def on_disk(engine: FakeEngine, wait: Callable[..., None], computed: int) -> Path:
    """The open segment, when so many prompt positions of it are on disk."""
    path = Path(engine.live.status()["segment"]["path"])
    wait(lambda: causes_of(path, by="rid")["computed"] >= computed)
    return path


def test_what_only_an_earlier_segment_holds_is_known_where_they_are_looked_at_together(engine: FakeEngine) -> None:
    segment = engine.flush()
    alone = {r.cause: r.tokens for r in why(segment).causes.itertuples()}
    assert str(Cause.DIVERGED) not in alone
    assert alone[str(Cause.NOT_IN_SEGMENT)] == len(MOVED)
    together = why(engine.live.root)
    counts = {r.cause: r.tokens for r in together.causes.itertuples()}
    assert counts == {"never seen": len(X) + 1, "diverged": len(X)}
    assert together.computed == len(X) + len(MOVED)
    assert set(together.pieces.loc[together.pieces["cause"] == "diverged", "nearest"].dropna()) <= {"a"}


def test_the_open_segment_is_told_of_as_far_as_it_is_on_disk(engine: FakeEngine, wait: Callable[..., None]) -> None:
    path = on_disk(engine, wait, len(MOVED))
    wait(lambda: causes_of(path)["causes"] == {"diverged": len(X), "never seen": 1})
    of_one = causes_of(path, rid="b")
    assert [(p["start"], p["end"], p["cause"]) for p in of_one["positions"]] == [
        (0, 1, "never seen"),
        (1, len(MOVED), "diverged"),
    ]
    assert "diverged" in of_one["remedies"]
    with pytest.raises(RunDirectoryError, match="no prompt of `nobody`"):
        causes_of(path, rid="nobody")


def test_a_name_that_was_given_again_is_another_request(engine: FakeEngine) -> None:
    engine.flush()
    engine.live.names.forget()  # as when nothing refers to the earlier one any more
    engine.serve("a", [6, *X])
    engine.flush()
    together = why(engine.live.root)
    assert set(together.pieces["rid"]) == {"a", "b", "a@2"}
    again = together.pieces[together.pieces["rid"] == "a@2"]
    assert dict(zip(again["cause"], again["tokens"], strict=True)) == {"never seen": 1, "diverged": len(X)}


def test_counts_are_of_closed_segments_and_a_damaged_one_is_counted_as_failed(
    engine: FakeEngine, wait: Callable[..., None], tmp_path: Path
) -> None:
    causes = Causes()
    causes.ask(engine.flush())
    causes.ask(tmp_path / "none")

    def answered() -> bool:
        causes.turn()
        return causes.failed == 1

    wait(answered, 120)
    assert dict(causes.tokens) == {"diverged": len(X), "never seen": 1}


def test_causes_need_to_know_prompts() -> None:
    with pytest.raises(ValidationError, match="privacy: hashes"):
        LiveConfig(causes=True)
    assert LiveConfig(causes=True, privacy="hashes").causes
