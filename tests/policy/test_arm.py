"""What an arm asks of the engine's start, of the running engine, and of each request."""

from __future__ import annotations

import pytest

from sglang_probe.policy.arm import Arm
from sglang_probe.policy.partners import Partners, group
from sglang_probe.policy.switches import SWITCHABLE, Switches

SERVER = {"page_size": 16, "chunked_prefill_size": 256}


def test_switchable_arguments_are_set_while_the_engine_runs_and_others_need_a_start() -> None:
    arm = Arm(cache="off", server={"chunked_prefill_size": 64, "page_size": 1})
    assert arm.start_args(SERVER) == {"page_size": 1, "chunked_prefill_size": 256}
    assert arm.switches(SERVER) == Switches(radix_cache=False, chunked_prefill_size=64)
    assert {"chunked_prefill_size", "enable_mixed_chunk", "schedule_policy"} == SWITCHABLE


def test_arms_that_differ_in_switches_only_share_an_engine() -> None:
    assert Arm().start_args(SERVER) == Arm(cache="off", server={"schedule_policy": "lpm"}).start_args(SERVER)


@pytest.mark.parametrize(("cache", "told"), [("on", None), ("off", None), ("read_only", "read_only")])
def test_requests_are_told_only_what_the_engine_cannot_be(cache: str, told: str | None) -> None:
    assert Arm.model_validate({"cache": cache}).bypass == told


def test_yaml_booleans_are_read_as_written() -> None:
    assert Arm.model_validate({"cache": False}).cache == "off"


def test_fixed_partners_stay_together_and_random_ones_do_not() -> None:
    requests = list(range(12))
    fixed = Partners(count=3)
    assert group(requests, fixed, None) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert sorted(group(requests, fixed, 1)) == group(requests, fixed, None)
    assert group(requests, fixed, 1) != group(requests, fixed, None)
    random = group(requests, Partners(count=3, draw="random"), 1)
    assert sorted(r for g in random for r in g) == requests
    assert sorted(random) != group(requests, fixed, None)
    assert group(requests, Partners(count=0), None) == [[r] for r in requests]
