"""What a request says that it belongs to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks.instruments.labels import labels_of
from sglang_probe.errors import ConfigError


def ask(labels: object) -> Ask:
    return Ask.of({"custom_params": {"probe": {"labels": labels}}})


def test_labels_are_those_of_the_request_and_a_session_of_sglang_is_one() -> None:
    assert labels_of(ask({"tenant": "acme"}), SimpleNamespace(session_id="s1")) == '{"session": "s1", "tenant": "acme"}'
    assert labels_of(ask({"session": "mine"}), SimpleNamespace(session_id="s1")) == '{"session": "mine"}'
    assert labels_of(Ask(), SimpleNamespace(session_id=None)) is None
    assert labels_of(Ask(), SimpleNamespace()) is None
    by_header = SimpleNamespace(session_id=None, routing_key="agent-7")
    assert labels_of(Ask(), by_header) == '{"session": "agent-7"}'
    assert labels_of(ask({"session": "mine"}), by_header) == '{"session": "mine"}'
    assert labels_of(Ask(), SimpleNamespace(session_id="s1", routing_key="agent-7")) == '{"session": "s1"}'
    assert labels_of(Ask(), SimpleNamespace(session_id=None, routing_key="")) is None


@pytest.mark.parametrize(
    "labels",
    [
        {"Session": "x"},
        {"session": ""},
        {"session": 7},
        {"session": "x" * 201},
        {f"a{i}": "x" for i in range(9)},
        ["x"],
    ],
)
def test_labels_that_are_none_are_refused(labels: object) -> None:
    with pytest.raises(ConfigError, match="labels"):
        ask(labels)
