"""The audit against a server that answers as it is told: what it finds, how seldom it is wrong, what it costs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from sglang_probe.client import FetchedRows
from sglang_probe.gate import audit
from sglang_probe.gate.audit import MORE, WARM_UP, Auditor, Candidate, candidates, drawn
from sglang_probe.gate.client import Answer, Facts, Ids, RefusedError
from sglang_probe.gate.rows import Held
from sglang_probe.run.run import Run

BORDER, TAIL = 60, 30


class Server:
    """Rounds as a lognormal of `sigma`; warm answers are moved by `wrong(prompt, how often it was asked warm)`."""

    def __init__(
        self, wrong: Callable[[Ids, int], float] = lambda prompt, n: 0.0, *, sigma: float = 0.6, cached: int = BORDER
    ) -> None:
        self.rng, self.wrong, self.sigma, self.cached = np.random.default_rng(0), wrong, sigma, cached
        self.asked: list[tuple[Ids, Mapping[str, str]]] = []
        self.warm: Counter[Ids] = Counter()

    def ask(self, ids: Sequence[int], *, salt: Mapping[str, str], start: int, **_: Any) -> Answer:
        prompt = tuple(ids)
        self.asked.append((prompt, salt))
        warm = self.warm[prompt]
        self.warm[prompt] += not salt
        true = -np.random.default_rng(prompt[0]).gamma(2.0, 0.7, len(prompt) - start - 1)
        size = 1e-3 * np.exp(self.sigma * self.rng.standard_normal())
        values = true + size * self.rng.standard_normal(len(true))
        if not salt:
            values += self.wrong(prompt, warm) * self.rng.standard_normal(len(true))
        return Answer("r", 0 if salt else self.cached, values, (1,), np.array([-0.1]))


def candidate(i: int) -> Candidate:
    return Candidate(f"r{i}", tuple(range(i, i + BORDER + TAIL)), BORDER, (f"o{i} [0, {BORDER})",))


def auditor(server: Server, **more: Any) -> Auditor:
    given = {"room": lambda: True, "tokens_per_minute": 1e12, **more}
    return Auditor(server, Facts(dtype="float32"), "cache_salt", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("sigma", [0.3, 0.6, 1.0])
def test_four_hundred_right_requests_raise_no_alarm(sigma: float) -> None:
    one = auditor(Server(sigma=sigma))
    found = [one.audit(candidate(i)).found for i in range(400)]
    assert found[: WARM_UP - 1] == ["too early"] * (WARM_UP - 1)
    assert found.count("wrong") == 0
    assert found.count("right") >= 385


def test_a_wrong_entry_is_found_and_the_request_that_computed_it_is_named() -> None:
    one = auditor(Server(lambda prompt, n: 0.5 if prompt[0] % 40 == 39 else 0.0))
    found = [one.audit(candidate(i)) for i in range(400)]
    alarms = [a for a in found if a.found == "wrong"]
    assert [a.rid for a in alarms] == [f"r{i}" for i in range(39, 400, 40)]
    assert alarms[0].origins == (f"o39 [0, {BORDER})",)
    assert all(not a.origins for a in found if a.found != "wrong")


def test_one_odd_cold_twin_hides_no_wrong_entry_that_comes_later() -> None:
    server = Server(lambda prompt, n: 0.5 if prompt[0] in (20, 40) else 0.0)
    one = auditor(server)
    for i in range(20):
        one.audit(candidate(i))
    quiet = server.ask

    def odd(ids: Sequence[int], **more: Any) -> Answer:
        a = quiet(ids, **more)
        return Answer(a.rid, a.cached, a.prompt + 0.5 * (len(server.asked) % 3 == 0), a.output, a.chosen)

    server.ask = odd  # type: ignore[method-assign]
    assert one.audit(candidate(20)).found == "right"  # by cold twins of its own that are as far apart
    server.ask = quiet  # type: ignore[method-assign]
    assert one.threshold < 0.1
    assert one.audit(candidate(40)).found == "wrong"


def test_what_is_wrong_once_is_not_confirmed() -> None:
    one = auditor(Server(lambda prompt, n: 0.5 if prompt[0] == 50 and n == 0 else 0.0))
    found = {a.rid: a.found for a in (one.audit(candidate(i)) for i in range(60))}
    assert found["r50"] == "not confirmed"
    assert "wrong" not in found.values()


def test_entries_that_have_gone_say_nothing_and_are_not_computed_anew() -> None:
    server = Server(cached=BORDER - 1)
    assert auditor(server).audit(candidate(0)).found == "gone"
    assert [bool(salt) for _, salt in server.asked] == [False]


def test_twins_wait_for_room_and_keep_to_their_budget() -> None:
    now, busy = [0.0], [3]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        busy[0] -= 1

    server = Server()
    one = auditor(server, room=lambda: busy[0] <= 0, tokens_per_minute=6000, clock=lambda: now[0], sleep=sleep)
    one.audit(candidate(0))
    assert now[0] == pytest.approx(0.6)  # three looks
    for i in range(1, 50):
        one.audit(candidate(i))
        assert one.computed - candidate(i).cost <= 100 * now[0]  # tokens a second; the last may have just begun


def test_the_budget_counts_what_twins_compute_and_what_they_take_of_the_cache() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    one = auditor(Server(), tokens_per_minute=6000, clock=lambda: now[0], sleep=sleep)
    one.audit(candidate(0))
    tail, whole = TAIL, BORDER + TAIL
    assert (one.computed, one.filled) == (tail + 2 * whole + MORE, 2 * whole + MORE)
    one.audit(candidate(1))
    assert now[0] == pytest.approx((tail + 4 * whole + 2 * MORE) / 100)


class Failing(Server):
    """Answers warm twins without numbers, or refuses those of one kind."""

    def __init__(self, refuses: str | None = None, cold: float = 0.0) -> None:
        super().__init__()
        self.refuses, self.cold = refuses, cold

    def ask(self, ids: Sequence[int], *, salt: Mapping[str, str], start: int, **more: Any) -> Answer:
        a = super().ask(ids, salt=salt, start=start, **more)
        if self.refuses == ("cold" if salt else "warm"):
            raise RefusedError("500")
        return Answer(a.rid, a.cached, a.prompt + (self.cold if salt else math.nan), a.output, a.chosen)


class WithRows(Server):
    """Also hands out rows, of which those after wrong entries are moved; probabilities are not."""

    def __init__(self, moved: Callable[[Ids], float], **more: Any) -> None:
        super().__init__(**more)
        self.moved, self.last, self.refuses_rows = moved, (0, False), False

    def ask(self, ids: Sequence[int], *, asks: Any = None, salt: Mapping[str, str], **more: Any) -> Answer:
        if asks is not None and self.refuses_rows:
            refused = RefusedError("too many rows")
            refused.status = 400
            raise refused
        self.last = ids[0], not salt
        return super().ask(ids, salt=salt, **more)

    def fetch(self, _asked: Any) -> FetchedRows:
        first, warm = self.last
        rows = self.rows(first, self.moved((first,)) if warm else 0.0)
        have = np.ones(TAIL, dtype=bool)
        return FetchedRows(rows.position, {"hook_embed": have}, [], {}, "r", BORDER + TAIL, {"hook_embed": rows.rows})

    def rows(self, first: int, moved: float) -> Held:
        true = np.random.default_rng(first).standard_normal((TAIL, 8))
        return Held(np.arange(BORDER, BORDER + TAIL), true + (1e-6 + moved) * self.rng.standard_normal((TAIL, 8)))


def test_rows_find_a_wrong_entry_that_moves_no_probability() -> None:
    server = WithRows(lambda prompt: 0.01 * (prompt[0] == 40))
    one = auditor(server, fetch=server.fetch)
    found = {a.rid: a for a in (one.audit(candidate(i)) for i in range(60))}
    assert [rid for rid, a in found.items() if a.found == "wrong"] == ["r40"]
    said = found["r40"]
    assert said.moved < said.threshold
    assert said.rows is not None
    assert (said.rows.hook_point, said.rows.past, said.rows.positions[0]) == ("hook_embed", True, BORDER)
    assert said.origins == (f"o40 [0, {BORDER})",)


@pytest.mark.parametrize(("cached", "else_"), [(BORDER, "right"), (0, "was right")])
def test_a_request_that_was_answered_over_wrong_entries_is_found_by_its_own_rows(cached: int, else_: str) -> None:
    """Whether its entries are cached still, and right by now, or gone."""
    server = WithRows(lambda prompt: 0.0, cached=cached)
    one = auditor(server, fetch=server.fetch)
    found = {}
    for i in range(60):
        rows = {"hook_embed": server.rows(i, 0.01 * (i == 40))}
        said = one.audit(dataclasses.replace(candidate(i), rows=lambda rows=rows: rows))  # type: ignore[misc]
        found[said.rid] = said
    assert [rid for rid, a in found.items() if a.found == "was wrong"] == ["r40"]
    assert {a.found for a in found.values()} == {"too early", else_, "was wrong"}
    assert found["r40"].origins == (f"o40 [0, {BORDER})",)


def test_a_server_that_gives_no_rows_is_audited_by_log_probabilities() -> None:
    server = WithRows(lambda prompt: 0.01)
    server.refuses_rows = True
    one = auditor(server, fetch=server.fetch)
    assert {one.audit(candidate(i)).found for i in range(30)} == {"too early", "right"}
    assert one.without_rows == 90


def test_a_warm_twin_without_numbers_is_wrong_from_the_first_audit_on() -> None:
    said = auditor(Failing()).audit(candidate(0))
    assert (said.found, said.moved, said.origins) == ("wrong", math.inf, (f"o0 [0, {BORDER})",))
    assert auditor(Failing(cold=math.nan)).audit(candidate(0)).found == "refused"


def test_a_warm_twin_that_is_refused_where_cold_ones_are_not_is_told_from_a_server_that_refuses() -> None:
    server = Failing("warm")
    assert auditor(server).audit(candidate(0)).found == "no answer"
    assert [bool(salt) for _, salt in server.asked] == [False, True, True] * 2  # once more
    assert auditor(Failing("cold")).audit(candidate(0)).found == "refused"


def test_from_the_end_on_nothing_is_asked_and_nothing_waits() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    server = Server()
    given = {"clock": lambda: now[0], "sleep": sleep, "until": 60.0}
    assert auditor(server, room=lambda: False, **given).audit(candidate(0)).found == "no room"
    assert (now[0], server.asked) == (60.0, [])
    assert auditor(server, **given).audit(candidate(0)).found == "no room"
    assert server.asked == []


def test_the_draw_ends_at_the_end_whatever_segments_there_are() -> None:
    now = itertools.count()
    read: list[str] = []

    def of(name: str) -> list[Candidate]:
        read.append(name)
        return [candidate(i) for i in range(4)]

    def closed() -> list[tuple[str, Callable[[], list[Candidate]]]]:
        return [(name, lambda name=name: of(name)) for name in ("s1", "s2", "s3", "s4")]  # type: ignore[misc]

    found = drawn(closed, share=1.0, until=6, clock=lambda: float(next(now)), sleep=lambda _: None)
    assert [name for name, _ in found] == ["s1"] * 4 + ["s2"] * 2
    assert read == ["s1", "s2"]
    found = drawn(closed, share=1.0, once=True)
    assert len(list(found)) == 16


def test_an_audit_never_flushes() -> None:
    with pytest.raises(ValueError, match="flushes"):
        Auditor(Server(), Facts(), "flush", room=lambda: True)  # type: ignore[arg-type]


def test_candidates_are_those_that_reused_with_the_origin_of_every_span(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    assert candidates(run) == []  # four tokens are too few to say anything
    monkeypatch.setattr(audit, "LEAST_REUSED", 1)
    monkeypatch.setattr(audit, "LEAST_TAIL", 1)
    (one,) = candidates(run)
    assert (one.rid, one.border, one.origins) == ("b", 4, ("a [0, 4)",))
    assert one.prompt == (3, 4, 5, 6, 9, 10)
    monkeypatch.setattr(audit, "PREFIX", "b")
    assert candidates(run) == []  # a twin of an audit is none
