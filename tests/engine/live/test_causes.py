"""Causes while a server records: of the open segment, over several, and as counts for `/metrics`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from sglang_probe.engine.live import causes as module
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


def test_a_request_is_told_of_once_its_end_is_on_disk(engine: FakeEngine, wait: Callable[..., None]) -> None:
    engine.prefill("c", [*X, 3], reused=0)
    path = on_disk(engine, wait, len(MOVED) + len(X) + 1)
    with pytest.raises(RunDirectoryError, match="does not hold the end of `c` yet"):
        causes_of(path, rid="c")
    engine.end("c")
    wait(lambda: "not known" not in causes_of(path)["causes"])
    assert "not known" not in {p["cause"] for p in causes_of(path, rid="c")["positions"]}


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


def test_one_that_hangs_does_not_stop_the_causes_for_good(
    engine: FakeEngine, wait: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Causes()
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "COMMAND", (sys.executable, "-c", "import signal; signal.pause()"))
        made.ask(tmp_path / "hangs")
        made.turn()
    assert made._running is not None
    hung = made._running[0]
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", 'print(\'{"causes": {"evicted": 3}}\')'))
    made.ask(tmp_path / "next")
    made.turn()
    assert (hung.returncode, made.failed) == (-9, 1)
    monkeypatch.setattr(module, "_SECONDS", 600.0)

    def answered() -> bool:
        made.turn()
        return bool(made.tokens)

    wait(answered, 120)
    assert dict(made.tokens) == {"evicted": 3}


def test_segments_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_WAITING", 2)
    made = Causes()
    for i in range(3):
        made.ask(tmp_path / str(i))
    assert (len(made._waiting), made.failed) == (2, 1)


def test_the_process_takes_a_bounded_address_space(tmp_path: Path) -> None:
    code = (
        "import sys; from sglang_probe.studies.why import live;"
        "live.causes_of = lambda *a, **k: bytearray(live.MEMORY); live.main()"
    )
    question = json.dumps({"segment": str(tmp_path), "rid": None})
    out = subprocess.run([sys.executable, "-c", code], input=question, capture_output=True, text=True, check=True)
    assert "of address space" in json.loads(out.stdout)["reason"]
