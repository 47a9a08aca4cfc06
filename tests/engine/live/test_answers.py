"""Rows for requests that asked: right, bounded, and missing with a reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_probe.client import FetchedRows, read_rows
from sglang_probe.engine.ledger.facts import Context, ForwardPlan, RequestEnd
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.engine.live import answers as module
from sglang_probe.engine.live.answers import GONE, NO_LONGER, SUFFIX, Answers, expire
from sglang_probe.engine.live.config import AnswersConfig
from sglang_probe.errors import ConfigError
from sglang_probe.rows_ask import RowsAsk, file_name

POINT = "blocks.0.hook_resid_post"
HANDLE = "h" * 22
PROMPT = np.array([3, 4, 5, 6, 7, 8])


class Made:
    """A recorder whose commits go to the answers alone. The row of a position is `[position, request number]`."""

    def __init__(self, folder: Path, *, at_once: bool = True, **config: float) -> None:
        self.folder, self.config, self.at_once = folder, AnswersConfig(**config), at_once
        self.answers = Answers(folder, self.config, [POINT])
        self.recorder = Recorder(self, lineage=Lineage(1, 1000), captures_rows=True)
        self._tag = 0

    def put(self, commit: object) -> None:
        # At once: what the thread would do, so that nothing depends on how fast it is.
        (self.answers._read if self.at_once else self.answers.take)(commit)  # type: ignore[arg-type]

    def serve(self, rid: str, number: int, *, reused: int = 0, steps: int = 2, ask: RowsAsk | None = None) -> None:
        end = RequestEnd(rid, len(PROMPT), steps + 1, reused, 0, "length", [1] * (steps + 1))
        for i in range(steps + 1):
            self._tag += 1
            start, stop = (reused, len(PROMPT)) if i == 0 else (len(PROMPT) + i - 1, len(PROMPT) + i)
            context = Context(PROMPT, None) if i == 0 else None
            mode = "decode" if i else "extend"
            plan = ForwardPlan(
                self._tag, mode, [rid], [start], [stop], [i > 0], [0], [len(PROMPT)], [context], stop - start
            )
            self.recorder.launch(plan)
            if ask is not None:
                self.answers.ask(rid, ask)
            plan.rows = {POINT: torch.tensor([[float(p), number] for p in range(start, stop)])}
            if i == 0:
                self.recorder.publish(rid, 0, Context(PROMPT, None), len(PROMPT), reused, reused)
            self.recorder.commit(self._tag, graph=False, ended=[end] if i == steps else [])

    def fetch(self, handle: str = HANDLE) -> FetchedRows:
        self.answers.close()
        return read_rows((self.folder / f"{file_name(handle)}{SUFFIX}").read_bytes())


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Made]]:
    made: list[Made] = []

    def start(**config: float) -> Made:
        made.append(Made(tmp_path / f"answers-{len(made)}", **config))
        return made[-1]

    yield start
    for m in made:
        m.answers.close()


def test_reused_positions_have_the_rows_of_whoever_computed_them(make: Callable[..., Made]) -> None:
    made = make()
    made.serve("a", 1)
    made.serve("b", 2, reused=4, ask=RowsAsk(handle=HANDLE))
    found = made.fetch()
    assert found.position.tolist() == [*range(8)]
    assert found[POINT].tolist() == [[p, 1 if p < 4 else 2] for p in range(8)]
    assert found.missing == {}
    assert [(s["start"], s["end"], s["status"], s["origin"]) for s in found.spans[:2]] == [
        (0, 4, "reused", "a"),
        (4, 6, "computed", None),
    ]


def test_the_thread_does_the_same(make: Callable[..., Made]) -> None:
    made = make(at_once=False)
    made.serve("a", 1)
    made.serve("b", 2, reused=4, ask=RowsAsk(handle=HANDLE))
    assert made.fetch()[POINT].tolist() == [[p, 1 if p < 4 else 2] for p in range(8)]


def test_only_what_was_asked_for_is_given(make: Callable[..., Made]) -> None:
    made = make()
    made.serve("a", 1, ask=RowsAsk(handle=HANDLE, last=2, windows=((1, 3),)))
    found = made.fetch()
    assert found.position.tolist() == [1, 2, 6, 7]
    assert found[POINT][:, 0].tolist() == [1, 2, 6, 7]


def test_what_is_no_longer_kept_is_missing_and_said(make: Callable[..., Made]) -> None:
    made = make(memory_megabytes=0.0015)  # a few forwards
    made.serve("a", 1)
    for i in range(8):
        made.serve(f"filler-{i}", 9, reused=5)
    made.serve("b", 2, reused=4, ask=RowsAsk(handle=HANDLE))
    found = made.fetch()
    assert found.has_row[POINT].tolist() == [False] * 4 + [True] * 4
    assert np.isnan(found[POINT][:4]).all()
    assert found[POINT][4:, 1].tolist() == [2.0] * 4
    assert found.missing == {POINT: {NO_LONGER: 4}}
    assert made.answers._held <= 1500


def test_a_handle_is_used_once_and_kept_for_a_bounded_time_and_size(make: Callable[..., Made]) -> None:
    made = make(seconds=100.0)
    made.serve("a", 1, ask=RowsAsk(handle=HANDLE))
    made.serve("b", 2, ask=RowsAsk(handle=HANDLE))
    assert made.fetch().rid == "a"
    place = made.folder / f"{file_name(HANDLE)}{SUFFIX}"
    assert HANDLE not in str(place)
    expire(made.folder, made.config)
    assert place.exists()
    expire(made.folder, AnswersConfig(megabytes=1.0, most_megabytes=1.0), room=999_999)
    assert not place.exists()
    assert place.with_suffix(GONE).exists()


def test_age_takes_an_answer_away(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(seconds=100.0)
    made.serve("a", 1, ask=RowsAsk(handle=HANDLE))
    made.fetch()
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 101)
    expire(made.folder, made.config)
    assert [p.suffix for p in made.folder.iterdir()] == [GONE]


def test_what_comes_faster_than_it_can_be_kept_holds_nobody_up(make: Callable[..., Made]) -> None:
    made = make(memory_megabytes=1e-6, at_once=False)
    made.serve("a", 1, ask=RowsAsk(handle=HANDLE))
    found = made.fetch()
    assert not found.has_row[POINT].any()
    assert found.missing == {POINT: {NO_LONGER: 8}}
    assert made.answers.late > 0


@pytest.mark.parametrize("wrong", ["short", "h" * 200, "../" + "h" * 30, "h" * 21 + "/"])
def test_a_handle_that_could_be_guessed_or_is_a_path_is_refused(wrong: str) -> None:
    from sglang_probe.ask import Ask

    with pytest.raises(ConfigError, match="handle"):
        Ask.of({"custom_params": {"probe": {"rows": {"handle": wrong}}}})
