"""Attributes on spans: nothing where nobody traces, and a fault in them is no request's."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import traces, wanted
from sglang_probe.engine.hooks.instruments.traces import Traces, span_ends
from sglang_probe.engine.hooks.session import Session
from sglang_probe.engine.ledger.facts import ForwardPlan
from sglang_probe.errors import UnsupportedError
from tests.engine.made_session import make_session

CONFIG = {"run": "run", "live": {"traces": True}}


class Span:
    """What SGLang keeps of a request's spans, as far as it is used."""

    def __init__(self, *, tracing: bool = True, broken: bool = False) -> None:
        self.tracing_enable, self._broken = tracing, broken
        self.attributes: dict[str, Any] = {}

    def trace_set_thread_attrs(self, attributes: dict[str, Any]) -> None:
        if self._broken:
            raise RuntimeError("the SDK fails")
        self.attributes.update(attributes)


class Live:
    def traced(self, rid: str, *, finishing: bool) -> dict[str, Any]:
        return {"sglang_probe.request": rid, "finishing": finishing}


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    made = make_session(monkeypatch, EngineProbeConfig.model_validate(CONFIG), Traces)
    made.live, made.epoch = Live(), 1  # type: ignore[assignment]
    return made


def launch(session: Session, span: Span) -> None:
    plan = ForwardPlan(0, "extend", ["r~1"], [0], [4], [False], [0], [4], [object()], 4)  # type: ignore[list-item]
    req = SimpleNamespace(time_stats=SimpleNamespace(trace_ctx=span))
    session.instruments[0].launch([req], [], plan)


def test_only_who_asks_has_hooks_on_spans() -> None:
    assert Traces not in wanted(EngineProbeConfig.model_validate({"run": "run", "live": {}}))
    assert Traces in wanted(EngineProbeConfig.model_validate(CONFIG))


@pytest.mark.parametrize(("dropped", "finishing"), [(None, True), ({"reason": "Aborted"}, False)])
def test_a_span_that_ends_gets_what_is_known_under_the_name_in_the_ledger(
    session: Session, dropped: Any, finishing: bool
) -> None:
    span = Span()
    launch(session, span)
    span_ends(span, abort_info=dropped)
    assert span.attributes == {"sglang_probe.request": "r~1", "finishing": finishing}
    span.attributes.clear()
    span_ends(span)  # again, where Python collects it
    assert span.attributes == {}


def test_a_request_that_is_not_traced_is_not_touched(session: Session) -> None:
    span = Span(tracing=False)
    before = dict(vars(span))
    launch(session, span)
    assert vars(span) == before


def test_a_span_of_an_earlier_recording_gets_nothing(session: Session) -> None:
    span = Span()
    launch(session, span)
    session.epoch += 1
    span_ends(span)
    assert span.attributes == {}


def test_an_sdk_that_fails_stops_neither_the_request_nor_the_recording_and_is_logged_once(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(traces, "_failures", itertools.count())
    for _ in range(3):
        span = Span(broken=True)
        launch(session, span)
        span_ends(span)
    assert [r.message for r in caplog.records if "attributes on a span" in r.message] == [caplog.records[-1].message]
    assert session.fault is None
    assert session.recorder is not None


def test_a_span_that_is_not_as_it_was_stops_no_recording(session: Session) -> None:
    plan = ForwardPlan(0, "extend", ["r"], [0], [4], [False], [0], [4], [object()], 4)  # type: ignore[list-item]
    session.instruments[0].launch([SimpleNamespace()], [], plan)
    assert session.fault is None
    assert session.recorder is not None


@pytest.mark.engine
def test_a_server_that_does_not_trace_refuses_to_promise_attributes(session: Session) -> None:
    with pytest.raises(UnsupportedError, match="this server makes none") as refused:
        session.instruments[0].open(session.config, None)
    assert "--enable-trace" in str(refused.value)
