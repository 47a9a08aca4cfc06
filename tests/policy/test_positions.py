"""What a request asks for when it prescribes RoPE positions."""

from __future__ import annotations

import json

import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.policy.positions import PositionOverride, override_of, recorded_override


def test_positions_behind_the_start_are_moved_and_those_before_are_not() -> None:
    override = PositionOverride.model_validate({"from": 10, "to": 3})
    assert override.moved(8, 13) == (2, [3, 4, 5])
    assert override.moved(12, 14) == (0, [5, 6])
    assert override.moved(2, 6) == (4, [])
    assert override.last(13) == 9  # position 9 is not moved, and is higher than 12, which becomes 5
    assert PositionOverride.model_validate({"from": 10, "to": 30}).last(13) == 32


def test_a_request_without_one_asks_for_nothing() -> None:
    assert override_of(None) is override_of({"probe": {"cache": "off"}}) is override_of({"probe": 3}) is None


@pytest.mark.parametrize("asked", [{"from": 0, "to": 1}, {"from": 3}, {"from": 3, "to": -1}, {"form": 3, "to": 1}, 7])
def test_what_cannot_be_read_is_refused(asked: object) -> None:
    with pytest.raises(ConfigError, match=r"custom_params\.probe\.positions"):
        override_of({"probe": {"positions": asked}})


def test_it_is_read_back_from_a_run() -> None:
    params = {"max_new_tokens": 1, "custom_params": {"probe": {"positions": {"from": 4, "to": 0}}}}
    found = recorded_override(json.dumps(params))
    assert found is not None
    assert (found.start, found.to) == (4, 0)
    assert recorded_override("{}") is None
