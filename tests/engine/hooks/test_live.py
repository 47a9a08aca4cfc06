"""What the endpoints do without, and what a broken probe does to a readback."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from sglang_probe.engine.hooks import http, resolved
from sglang_probe.engine.hooks.instruments import live


def test_several_http_processes_get_no_endpoints_and_a_word_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sglang_probe"):
        http.add_routes(SimpleNamespace(tokenizer_worker_num=2), None)
    assert "tokenizer-worker-num" in caplog.text


def test_a_failure_to_add_routes_costs_the_routes_only(caplog: pytest.LogCaptureFixture) -> None:
    http.add_routes(SimpleNamespace(), None)
    assert "could not add its endpoints" in caplog.text


def test_a_readback_without_a_recording_says_so() -> None:
    result = SimpleNamespace(internal_state={})
    live.get_internal_state(result, None)
    assert result.internal_state["probe"]["recording"] is False
    live.get_internal_state(object(), None)  # cannot be extended: no error


def test_the_manifest_names_no_keys() -> None:
    assert not [name for name in resolved.ARGUMENTS if any(word in name for word in ("key", "password", "secret"))]
