"""What a client says of its system prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_probe.engine.hooks.instruments.telemetry import system_ranges
from sglang_probe.engine.hooks.scheduler import forced_tokens


@pytest.mark.parametrize(
    "system",
    ["bogus", 3, [3], [[0]], [["a", "b"]], [[0.5, 2]], [[5, 2]], [[-1, 4]], [[0, 1 << 70]], [[True, 4]], [[0, 1]] * 65],
)
def test_what_cannot_be_read_is_unknown(system: Any) -> None:
    assert system_ranges({"probe": {"system": system}}) is None


@pytest.mark.parametrize("custom_params", [None, {}, "x", {"probe": None}, {"probe": "x"}, {"probe": {}}])
def test_nothing_said_is_unknown_and_forces_nothing(custom_params: Any) -> None:
    assert system_ranges(custom_params) is None
    req = SimpleNamespace(sampling_params=SimpleNamespace(custom_params=custom_params))
    assert forced_tokens([req], SimpleNamespace(ends=[4], prompt_lens=[4])) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("force", "found"), [("x", None), (7, None), ([None], None), ([True], None), ([5], ([0], [5]))]
)
def test_what_is_not_a_token_is_not_forced(force: Any, found: Any) -> None:
    req = SimpleNamespace(sampling_params=SimpleNamespace(custom_params={"probe": {"force": force}}))
    assert forced_tokens([req], SimpleNamespace(ends=[4], prompt_lens=[4])) == found  # type: ignore[arg-type]


def test_ranges_are_taken_and_an_empty_list_means_no_system_prompt() -> None:
    assert system_ranges({"probe": {"system": [[0, 9], (12, 12)]}}) == [[0, 9], [12, 12]]
    assert system_ranges({"probe": {"system": []}}) == []
