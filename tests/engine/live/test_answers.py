"""Rows for requests that asked: right, bounded, and missing with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_probe.client import FetchedRows, read_rows
from sglang_probe.engine.ledger.facts import Commit, Context, ForwardPlan, RequestEnd
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.engine.live import answers as module
from sglang_probe.engine.live.answer_files import FULL, GONE, LATE, STOPPED, SUFFIX
from sglang_probe.engine.live.answers import NO_LONGER, UNACCOUNTED, Answers, put_together
from sglang_probe.engine.live.config import AnswersConfig, LiveConfig
from sglang_probe.engine.live.held_rows import Chunk, HeldRows, Line, Piece
from sglang_probe.engine.live.recording import LiveRecording
from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.rows_ask import RowsAsk, file_name
from sglang_probe.run import schema

POINT = "blocks.0.hook_resid_post"
HANDLE = "h" * 22
OTHER = "o" * 22
PROMPT = np.array([3, 4, 5, 6, 7, 8])
AT = {name: schema.SPANS.get_field_index(name) for name in schema.SPANS.names}


class Made:
    """A recorder whose commits go to the answers alone. The row of a position is `[position, request number]`."""

    def __init__(self, folder: Path, *, at_once: bool = True, **config: float) -> None:
        self.folder, self.config, self.at_once = folder, AnswersConfig(**config), at_once
        self.answers = Answers(folder, self.config, [POINT])
        if not at_once:
            self.answers.start()
        self.recorder = Recorder(self, lineage=Lineage(1, 1000), captures_rows=True)
        self.rows = True
        """Whether the rows of a commit are not too many to be held."""
        self._tag = 0

    def put(self, commit: Commit) -> None:
        if not self.rows:  # what `take` passes on when too much waits
            commit = Commit(forward=commit.forward, spans=commit.spans, requests=commit.requests)
        self.answers.take(commit)
        if self.at_once:  # what the thread would do, so that nothing depends on how fast it is
            self.answers._turn()

    def serve(self, rid: str, number: int, *, reused: int = 0, steps: int = 2, ask: RowsAsk | None = None) -> None:
        for i in range(steps + 1):
            self.step(rid, number, i, reused=reused, ask=ask, last=i == steps)

    def step(
        self, rid: str, number: int, i: int, *, reused: int = 0, ask: RowsAsk | None = None, last: bool = False
    ) -> None:
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
        end = RequestEnd(rid, len(PROMPT), i + 1, reused, 0, "length", [1] * (i + 1))
        self.recorder.commit(self._tag, graph=False, ended=[end] if last else [])

    def place(self, handle: str = HANDLE, suffix: str = SUFFIX) -> Path:
        return self.folder / f"{file_name(handle)}{suffix}"

    def fetch(self, handle: str = HANDLE) -> FetchedRows:
        if not self.at_once:
            self.answers._end_thread(60)
        return read_rows(self.place(handle).read_bytes())


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
    assert [(s["start"], s["end"], s["status"], s["phase"]) for s in found.spans] == [
        (0, 4, "reused", None),
        (4, 6, "computed", "prefill"),
        (6, 8, "computed", "decode"),
    ]
    assert '"a"' not in json.dumps(found.spans)  # SGLang would abort another's request by its id


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
    assert made.answers._held.nbytes <= 1500


def test_a_handle_is_used_once_and_no_file_name_tells_it(make: Callable[..., Made]) -> None:
    made = make()
    made.serve("a", 1, ask=RowsAsk(handle=HANDLE))
    made.serve("b", 2, ask=RowsAsk(handle=HANDLE))
    assert made.fetch().rid == "a"
    assert HANDLE not in str(made.place())


def test_a_name_that_was_given_again_gives_no_row_of_the_request_before(make: Callable[..., Made]) -> None:
    made = make()
    made.serve("x", 1)
    made.rows = False  # they come too fast to be held
    made.serve("x", 2, ask=RowsAsk(handle=HANDLE))
    found = made.fetch()
    assert not found.has_row[POINT].any()
    assert found.missing == {POINT: {NO_LONGER: 8}}


@pytest.mark.parametrize("held", [True, False])
def test_who_reused_of_a_request_has_nothing_of_the_next_one_of_its_name(make: Callable[..., Made], held: bool) -> None:
    made = make()
    made.rows = held
    made.serve("x", 1)
    made.rows = True
    made.step("b", 3, 0, reused=4, ask=RowsAsk(handle=HANDLE))
    made.recorder.lineage = Lineage(1, 1000)  # nothing is remembered any more, so the name is free
    made.serve("x", 2)
    made.step("b", 3, 1, last=True)
    found = made.fetch()
    assert found.has_row[POINT].tolist() == [held] * 4 + [True] * 3
    assert found[POINT][4:, 1].tolist() == [3] * 3
    if held:
        assert found[POINT][:4, 1].tolist() == [1] * 4


def test_a_name_given_again_asks_for_its_own(make: Callable[..., Made]) -> None:
    made = make()
    made.answers.ask("x", RowsAsk(handle=HANDLE))  # of a request whose end nobody saw
    made.serve("x", 2, ask=RowsAsk(handle=OTHER))
    assert made.fetch(OTHER)[POINT][:, 1].tolist() == [2] * 8
    assert not made.place(HANDLE).exists()


def test_rows_are_copies_of_what_the_next_forward_overwrites(make: Callable[..., Made]) -> None:
    made = make()
    ring: list[torch.Tensor] = []
    put = made.put

    def overwrite(commit: Commit) -> None:
        ring.extend((commit.rows or {}).values())
        put(commit)
        for rows in ring:
            rows.fill_(-1)

    made.put = overwrite  # type: ignore[method-assign]
    made.serve("a", 1, ask=RowsAsk(handle=HANDLE))
    assert made.fetch()[POINT].tolist() == [[p, 1] for p in range(8)]


def span(start: int, end: int, *, attempt: int = 0, rid: str = "r", **others: Any) -> tuple[Any, ...]:
    made = {"rid": rid, "attempt": attempt, "start": start, "end": end, "status": schema.COMPUTED, "row_start": start}
    return tuple({"phase": schema.DECODE, **made, **others}.get(name) for name in schema.SPANS.names)


def ended(length: int, reason: str = "length") -> tuple[Any, ...]:
    made = {"rid": "r", "prompt_len": 1, "output_len": length, "finish_reason": reason}
    return tuple(made.get(name) for name in schema.ENGINE_REQUESTS.names)


def line(*numbers: Sequence[float], start: int = 0) -> Line:
    """A position a piece."""
    made = Line()
    for i, row in enumerate(numbers):
        made.add(Piece(start + i, start + i + 1, Chunk({POINT: torch.tensor([list(row)])}, {}, 0, []), 0))
    return made


def test_rows_are_those_of_the_last_attempt_without_what_came_after_the_end() -> None:
    spans = [
        (span(0, 3), line([1.0], [1.0], [1.0])),
        (span(0, 2, attempt=1), line([2.0], [2.0])),
        (span(2, 3, attempt=1, phase=schema.OVERSHOOT), line([9.0], start=2)),
    ]
    tensors, told = put_together(ended(3), RowsAsk(handle=HANDLE), spans, [POINT])
    assert tensors[POINT][:2, 0].tolist() == [2, 2]
    assert tensors[f"{POINT}/has_row"].tolist() == [1, 1, 0]
    assert [(s["start"], s["end"]) for s in told["spans"]] == [(0, 2)]


def test_attempts_are_held_apart_and_what_was_discarded_is_not_held() -> None:
    held = HeldRows(1e6)
    forward = tuple(0 if name == "row_start" else None for name in schema.FORWARDS.names)
    spans = [span(0, 1), span(0, 1, attempt=1, row_start=1), span(1, 2, row_start=2, phase=schema.OVERSHOOT)]
    held.take(Commit(forward=forward, rows={POINT: torch.tensor([[1.0], [2.0], [3.0]])}, spans=spans))
    for attempt in (0, 1):
        own = held.own(span(0, 1, attempt=attempt))
        assert own is not None
        assert [(p.start, p.offset) for p in own.between(0, 9)] == [(0, attempt)]
    assert held.own(span(0, 1, attempt=2)) is None


def test_of_a_request_that_could_not_be_accounted_for_nothing_is_given() -> None:
    spans = [(span(0, 3), line([1.0], [1.0], [1.0]))]
    tensors, told = put_together(ended(3, schema.UNACCOUNTED), RowsAsk(handle=HANDLE), spans, [POINT])
    assert POINT not in tensors
    assert told["missing"] == {POINT: {UNACCOUNTED: 3}}


@pytest.mark.parametrize(("ask", "most"), [({"last": 1}, 1), ({}, 1000)])
def test_the_work_grows_with_what_is_asked_for_and_not_with_its_square(
    ask: dict[str, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode step is a span and a piece."""
    seen = 0
    between = Line.between

    def counted(self: Line, start: int, end: int) -> list[Piece]:
        nonlocal seen
        found = between(self, start, end)
        seen += 1 + len(found)
        return found

    monkeypatch.setattr(Line, "between", counted)
    held = line(*([float(i)] for i in range(1000)))
    spans = [(span(i, i + 1), held) for i in range(1000)]
    tensors, told = put_together(ended(1000), RowsAsk(handle=HANDLE, **ask), spans, [POINT])
    assert tensors[POINT][:, 0].tolist() == [*range(1000)][-most:]
    assert seen <= 2 * most
    assert len(told["spans"]) == 1


def test_what_is_dropped_first_is_not_found_any_more() -> None:
    held = line(*([float(i)] for i in range(200)))
    for _ in range(150):
        held.drop_first()
    assert len(held) == 50
    assert [p.start for p in held.between(100, 153)] == [150, 151, 152]
    assert held.between(0, 150) == []


def test_a_stop_forgets_what_was_in_flight_and_says_so(make: Callable[..., Made]) -> None:
    made = make()
    made.step("a", 1, 0, ask=RowsAsk(handle=HANDLE))
    made.answers.forget()
    assert made.answers.status()["waiting"] == 0
    made.answers.ask("b", RowsAsk(handle=OTHER))  # launched before anybody knew of the stop
    made.answers._turn()
    assert made.answers._held.nbytes == 0
    for handle in (HANDLE, OTHER):
        assert made.place(handle, GONE).read_text() == STOPPED
    made.answers.resume(2)
    made.answers.ask("c", RowsAsk(handle="c" * 22), 1)  # of the epoch before
    made.answers._turn()
    assert made.place("c" * 22, GONE).read_text() == STOPPED
    made.answers.ask("d", RowsAsk(handle="d" * 22), 2)
    assert made.answers.status()["waiting"] == 1


def test_a_stop_of_the_recording_reaches_the_answers(tmp_path: Path, wait: Callable[..., None]) -> None:
    live = LiveRecording(
        tmp_path, LiveConfig(), {}, tick=0.02, answers=lambda: Answers(tmp_path / "a", AnswersConfig(), [POINT])
    )
    try:
        assert live.answers is not None
        live.answers.ask("a", RowsAsk(handle=HANDLE))
        live.stop("on purpose", "probe")
        live.answers._turn()
        assert (tmp_path / "a" / f"{file_name(HANDLE)}{GONE}").read_text() == STOPPED
        wait(lambda: live.epoch == 2)
        live.answers.ask("b", RowsAsk(handle=OTHER), live.epoch)
        assert live.answers.status()["waiting"] == 1
    finally:
        live.close()
    assert not (tmp_path / "a").exists()


def test_a_second_server_on_the_directory_removes_nothing(tmp_path: Path) -> None:
    made: list[Answers] = []

    def make() -> Answers:
        made.append(Answers(tmp_path / "a", AnswersConfig(), [POINT]))
        return made[-1]

    live = LiveRecording(tmp_path, LiveConfig(), {}, tick=0.02, answers=make)
    try:
        (tmp_path / "a" / "waits").touch()
        with pytest.raises(RunDirectoryError, match="another server records"):
            LiveRecording(tmp_path, LiveConfig(), {}, answers=make)
        assert (tmp_path / "a" / "waits").exists()
        assert len(made) == 1
    finally:
        live.close()


def test_asks_and_commits_that_wait_are_bounded(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()
    monkeypatch.setattr(module, "_MOST_ASKED", 2)
    for i in range(3):
        made.answers.ask(str(i), RowsAsk(handle=str(i) * 22))
    assert made.answers.status()["waiting"] == 2
    made.answers._turn()
    assert made.place("2" * 22, GONE).read_text() == FULL
    monkeypatch.setattr(module, "_MOST_WAITING", 4)
    for _ in range(20):
        made.answers.take(Commit())
        assert len(made.answers._waiting) <= 4
    made.answers._turn()
    assert made.place("0" * 22, GONE).read_text() == LATE
    assert made.answers.status()["waiting"] == 0


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
