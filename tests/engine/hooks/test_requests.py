"""A request was made: read once, refused with a reason, and told how to use the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks import guard, requests
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.session import Session
from tests.engine.made_session import SCHEDULER, made_request, make_session

ALL = ["force", "cache", "positions", "evict"]


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Session:
    return make_session(monkeypatch, EngineProbeConfig(run=tmp_path, asks=ALL))


@pytest.mark.parametrize(
    ("probe", "told"),
    [
        ({"forse": [1]}, "unknown key `forse`; did you mean `force`"),
        ({"cache": "of"}, "cache"),
        ({"force": [100]}, "token 100 is not within the vocabulary of 100"),
        ({"positions": {"from": 8, "to": 60}}, "not within a prompt of 16 tokens and a context of 64"),
        ({"evict": "k"}, "no kept set of this recording, which has none"),
        (
            {"provenance": True},
            "not started for `provenance`; it honours `cache`, `evict`, `force`, `labels`, `positions`",
        ),
        ({"system": [[0, 3]]}, "not started for `system`"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name_and_the_recording_goes_on(
    running: Session, probe: dict[str, Any], told: str
) -> None:
    req = made_request(**probe)
    requests.made(req, SCHEDULER)
    assert told in req.refused
    assert requests.ask_of(req) == Ask()
    assert running.fault is None


def test_what_can_be_had_is_read_once(running: Session) -> None:
    req = made_request(force=[7], cache="write_only")
    requests.made(req, SCHEDULER)
    req.sampling_params.custom_params = None
    assert req.refused is None
    assert requests.ask_of(req) == Ask(force=(7,), cache="write_only")


def test_one_that_sglang_refused_is_not_refused_again(running: Session) -> None:
    req = made_request(forse=[1])
    req.to_finish = "for another reason"
    requests.made(req, SCHEDULER)
    assert req.refused is None


def test_a_fault_in_the_check_refuses_the_request_and_not_the_engine(
    running: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr(running.instruments[0], "admit", broken)
    req = made_request(force=[7])
    requests.made(req, SCHEDULER)
    assert "could not be checked" in req.refused
    assert running.fault is None  # a matter of this request alone


def test_a_fault_in_the_check_is_no_matter_of_a_request_that_asks_nothing(
    running: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests.Ask, "of", lambda _: 1 / 0)
    req = made_request()
    requests.made(req, SCHEDULER)
    assert req.refused is None
    assert running.fault is None


def test_nobody_escapes_what_all_are_to_run_under_by_a_fault_in_the_check(
    running: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests.Ask, "of", lambda _: 1 / 0)
    monkeypatch.setattr(running.instruments[0], "of_all", True)
    req = made_request()
    requests.made(req, SCHEDULER)
    assert "could not be checked" in req.refused


def test_what_a_recording_that_has_stopped_would_do_is_refused_with_the_reason(running: Session) -> None:
    running.fail("somewhere", ValueError("the disk is full"))
    asking, plain = made_request(force=[7]), made_request()
    for req in (asking, plain):
        requests.made(req, SCHEDULER)
    assert "the recording has stopped" in asking.refused
    assert "the disk is full" in asking.refused
    assert plain.refused is None


def test_what_one_rank_would_do_alone_is_refused_by_all(running: Session) -> None:
    running.tp_size = 2
    for probe, refused in (
        ({"force": [7]}, True),
        ({"positions": {"from": 8, "to": 9}}, True),
        ({"cache": "off"}, False),
    ):
        req = made_request(**probe)
        requests.made(req, SCHEDULER)
        assert ("one rank alone" in (req.refused or "")) is refused


@pytest.mark.parametrize(("use", "skips"), [(None, False), ("write_only", False), ("read_only", True), ("off", True)])
def test_a_request_that_does_not_write_is_told_so(running: Session, use: str | None, skips: bool) -> None:
    req = made_request(**({} if use is None else {"cache": use}))
    requests.made(req, SCHEDULER)
    assert req.skip_radix_cache_insert is skips


@pytest.mark.parametrize(
    ("probe", "limit"),
    [
        ({}, None),
        ({"cache": "read_only"}, None),
        ({"cache": "write_only"}, 0),
        ({"cache": "off"}, 0),
        ({"positions": {"from": 8, "to": 9}}, 8),
        ({"positions": {"from": 8, "to": 9}, "cache": "off"}, 0),
    ],
)
def test_how_much_of_the_cache_a_request_may_read(running: Session, probe: dict[str, Any], limit: int | None) -> None:
    req = made_request(**probe)
    requests.made(req, SCHEDULER)
    assert requests.read_limit(req) == limit


def test_without_a_session_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "session", None)
    req = made_request(forse=[1])
    requests.made(req, SCHEDULER)
    assert req.refused is None
    assert requests.read_limit(req) is None
