"""What is sent, to a server that caches by salt and always answers alike."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sglang_probe.gate.arms import Cold, Sent, send
from sglang_probe.gate.client import Answer, Ids, RefusedError
from sglang_probe.gate.gate import GateConfig, Result
from sglang_probe.gate.judge import Judgement, judge
from sglang_probe.gate.page import failures_told, gate_page
from sglang_probe.gate.verdict import Verdict
from sglang_probe.report.page import render
from tests.gate.made import FACTS, case

CASES = [case(i) for i in range(3)]


class Server:
    """Keeps what it computed, each salt for itself; refuses what reuses `refuses` tokens."""

    def __init__(self, refuses: int | None = None) -> None:
        self.held: dict[str, set[Ids]] = {}
        self.refuses, self.lock = refuses, threading.Lock()

    def ask(self, ids: Sequence[int], *, new: int, salt: Mapping[str, str], start: int = -1, **_: Any) -> Answer:
        prompt, made = tuple(ids), tuple(range(new))
        with self.lock:
            held = self.held.setdefault(str(salt), set())
            border = len(prompt) - 1 if start < 0 else start
            cached = max((common(one, prompt[:border]) for one in held), default=0)
            held.add(prompt + made[:-1])
        if cached == self.refuses:
            raise RefusedError("answers 500: no")
        values = np.array([-0.1 * (7 * t % 11 + i % 3) for i, t in enumerate(prompt + made)])
        at = len(prompt) if start < 0 else start + 1
        top = tuple({t: float(v)} for t, v in zip(made, values[len(prompt) :], strict=True))
        return Answer("r", cached, values[at : len(prompt)], made, values[len(prompt) :], top)

    def give_up(self, ids: Sequence[int], *, salt: Mapping[str, str]) -> None:
        self.ask(ids, new=1, salt=salt)

    def flush(self) -> bool:
        self.held.clear()
        return True


def common(a: Ids, b: Ids) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def sent(server: Server, paths: Sequence[str], cold: Cold = "cache_salt") -> tuple[Sent, Judgement]:
    found = send(server, CASES, cold, new=8, paths=paths, company=2)  # type: ignore[arg-type]
    return found, judge(CASES, found.arms, FACTS, paths=found.paths, refused=found.refused, unsent=found.unsent)


@pytest.mark.parametrize("path", ["branch", "repeat", "staged", "turns", "company", "cancelled"])
def test_each_path_alone_can_be_judged(path: str) -> None:
    found, told = sent(Server(), [path])
    assert (found.failures, found.paths) == ([], (path,))
    assert told.verdict is Verdict.EQUAL
    assert told.sentence.endswith(f"on {path}.")


def test_refusals_are_kept_by_arm_and_case_and_leave_no_good_verdict() -> None:
    found, told = sent(Server(refuses=len(CASES[0].prompt) - 1), ["branch", "repeat"])
    assert found.refused["repeat-2"] == dict.fromkeys(range(3), "answers 500: no")
    assert told.verdict is Verdict.INCONCLUSIVE
    assert "3 of 6 comparisons" in told.sentence


def test_what_a_flush_cannot_ask_is_named_and_the_verdict_is_of_the_others() -> None:
    found, told = sent(Server(), ["branch", "company"], "flush")
    assert (found.paths, list(found.unsent)) == (("branch",), ["company"])
    assert told.verdict is Verdict.EQUAL
    assert told.reasons[0].startswith("company: not asked, because requests at a time need a salt each")
    assert sent(Server(), ["company"], "flush")[1].verdict is Verdict.INCONCLUSIVE


def test_the_page_and_the_summary_count_what_got_no_answer_and_have_no_number_for_what_is_none() -> None:
    found, _ = sent(Server(refuses=len(CASES[0].prompt) - 1), ["branch", "repeat"])
    one = found.arms["branch-1"][0]
    found.arms["branch-1"][0] = replace(one, prompt=np.full_like(one.prompt, np.nan))
    told = judge(CASES, found.arms, FACTS, paths=found.paths, refused=found.refused)
    result = Result("http://a", FACTS, GateConfig(), "cache_salt", CASES, found, told, 9, 1.0)
    assert failures_told(result, most=2) == [*found.failures[:2], "4 further requests got no answer"]
    summary = result.to_json()
    assert (summary["verdict"], summary["failed_requests"]) == ("WRONG REUSE", 6)
    assert summary["wrong"][0]["moved"] is None
    json.dumps(summary, allow_nan=False)
    assert "log-probabilities are no numbers" in render(gate_page(result))
