"""What a request asks of the probe: read, written and refused in one place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_probe.ask import Ask, PositionOverride, recorded, recorded_override
from sglang_probe.errors import ConfigError

EVERYTHING = {
    "force": [5, None, 7],
    "cache": "off",
    "positions": {"from": 3, "to": 40},
    "evict": "r0.snapkv",
    "system": [[0, 4], [6, 9]],
    "provenance": True,
}


def asking(**probe: Any) -> dict[str, Any]:
    return {"temperature": 0.0, "custom_params": {"probe": probe}}


def test_what_is_written_is_what_is_read() -> None:
    ask = Ask.of(asking(**EVERYTHING))
    assert ask.to_json() == EVERYTHING
    assert Ask.of(ask.into({"top_p": 1.0})) == ask
    assert ask.fields == set(EVERYTHING)


@pytest.mark.parametrize("params", [{}, {"custom_params": None}, {"custom_params": {"thinking_budget": 3}}])
def test_a_request_that_says_nothing_asks_nothing(params: dict[str, Any]) -> None:
    assert Ask.of(params) == Ask.of(SimpleNamespace(custom_params=params.get("custom_params"))) == Ask()
    assert Ask().into(params) == params


def test_writing_keeps_what_others_put_beside_it_and_what_the_request_asked_already() -> None:
    params = {"custom_params": {"thinking_budget": 3, "probe": {"cache": "off", "force": [1]}}}
    told = Ask(force=(2,), system=((0, 1),)).into(params)
    assert told["custom_params"] == {
        "thinking_budget": 3,
        "probe": {"cache": "off", "force": [2], "system": [[0, 1]]},
    }
    assert params["custom_params"]["probe"] == {"cache": "off", "force": [1]}


@pytest.mark.parametrize(
    ("probe", "told"),
    [
        ({"forse": [1]}, "`forse`; did you mean `force`"),
        ({"cahce": "off"}, "`cahce`; did you mean `cache`"),
        ({"cache": "of"}, "'read_only', 'write_only' or 'off'"),
        ({"cache": False}, "cache"),
        ({"force": "abc"}, "force"),
        ({"force": [-1]}, "force.0"),
        ({"force": [1.5]}, "force.0"),
        ({"force": [True]}, "force.0"),
        ({"force": [[1]]}, "force.0"),
        ({"positions": 3}, "positions"),
        ({"positions": {"from": 0, "to": 3}}, "positions.from"),
        ({"positions": {"from": 3}}, "`positions.to` is required"),
        ({"evict": 7}, "evict"),
        ({"system": [[3, 1]]}, "[3, 1] is no range"),
        ({"system": [[0, 1 << 40]]}, "is no range"),
        ({"system": [[0, 1]] * 65}, "system"),
        ({"provenance": "yes"}, "provenance"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(probe: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Ask.of(asking(**probe))
    assert told in str(refused.value)
    assert "custom_params.probe" in str(refused.value)


@pytest.mark.parametrize("custom", [[1], "probe", {"probe": [1]}, {"probe": "off"}, {"probe": True}])
def test_what_is_no_mapping_is_refused(custom: Any) -> None:
    with pytest.raises(ConfigError, match="is a mapping, not"):
        Ask.of({"custom_params": custom})


SIZES = {"prompt_len": 10, "new_tokens": 4, "context": 64, "vocabulary": 100}


@pytest.mark.parametrize(
    ("probe", "told"),
    [
        ({"force": [1, 100]}, r"force\[1\]: token 100 is not within the vocabulary of 100"),
        ({"positions": {"from": 10, "to": 3}}, "from 10 to 3 is not within a prompt of 10"),
        ({"positions": {"from": 5, "to": 60}}, "context of 64"),
        ({"system": [[0, 11]]}, r"\[0, 11\] is not within a prompt of 10"),
    ],
)
def test_values_are_checked_and_not_only_types(probe: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Ask.of(asking(**probe)).check(**SIZES)


def test_values_that_the_request_can_have_pass() -> None:
    Ask.of(asking(force=[99, None], positions={"from": 9, "to": 59}, system=[[0, 10]])).check(**SIZES)


def test_what_a_recording_was_not_started_for_is_refused_by_name() -> None:
    ask = Ask.of(asking(cache="off", force=[1]))
    ask.refuse_beyond(frozenset({"cache", "force", "system"}))
    with pytest.raises(ConfigError, match="not started for `force`; it honours `cache`"):
        ask.refuse_beyond(frozenset({"cache"}))


@pytest.mark.parametrize(
    ("probe", "reads", "publishes"),
    [
        ({}, True, True),
        ({"cache": "read_only"}, True, False),
        ({"cache": "write_only"}, False, True),
        ({"cache": "off"}, False, False),
        ({"evict": "k"}, True, False),
        ({"positions": {"from": 1, "to": 1}}, True, False),
    ],
)
def test_how_a_request_uses_the_cache(probe: dict[str, Any], reads: bool, publishes: bool) -> None:
    ask = Ask.of(asking(**probe))
    assert (ask.reads, ask.publishes) == (reads, publishes)


def test_the_record_of_a_request_holds_its_positions_and_no_other_ask() -> None:
    told = recorded(asking(**EVERYTHING))
    assert told == {"temperature": 0.0, "custom_params": {"probe": {"positions": {"from": 3, "to": 40}}}}
    assert recorded(asking(cache="off")) == {"temperature": 0.0}
    override = recorded_override('{"custom_params": {"probe": {"positions": {"from": 3, "to": 40}}}}')
    assert override is not None
    assert override.moved(2, 5) == (1, [40, 41])


def test_positions_after_the_start_are_moved_and_those_before_are_not() -> None:
    override = PositionOverride.model_validate({"from": 10, "to": 3})
    assert override.moved(8, 13) == (2, [3, 4, 5])
    assert override.moved(12, 14) == (0, [5, 6])
    assert override.moved(2, 6) == (4, [])
    assert override.last(13) == 9  # position 9 is not moved, and is higher than 12, which becomes 5
    assert PositionOverride.model_validate({"from": 10, "to": 30}).last(13) == 32
