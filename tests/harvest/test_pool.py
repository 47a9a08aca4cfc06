"""The KV pool that is chosen for a workload: small where that changes nothing, and never smaller than it may be."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_probe.engine.platform.defaults import MAX_TOTAL_TOKENS
from sglang_probe.harvest.pool import Pool, distinct_tokens, left_open
from sglang_probe.workload.request import Request


def requests(*prompts: tuple[int, ...], **sampling: Any) -> list[Request]:
    sampling = {"max_new_tokens": 10, **sampling}
    return [Request(i, f"r{i}", p, (), None, sampling) for i, p in enumerate(prompts)]


def test_a_prefix_tree_holds_what_prompts_share_once() -> None:
    assert distinct_tokens([(1, 2, 3), (1, 2, 4), (1, 2), (5,)], 100) == 5
    assert distinct_tokens([(1, 2, 3)] * 50, 100) == 3
    assert distinct_tokens([(i,) for i in range(200)], 100) == 100
    assert distinct_tokens([], 100) == 0


def test_the_pool_holds_everything_at_once_and_what_is_in_flight() -> None:
    apart = requests(*(tuple(range(1000 * i, 1000 * i + 500)) for i in range(8)))
    tokens = Pool(together=4).tokens(apart)
    # Eight prompts with their outputs, and four requests beside them, with two slots each to spare.
    assert tokens >= 8 * (500 + 12) + 4 * (500 + 12)
    assert tokens < MAX_TOTAL_TOKENS / 8
    assert tokens % 1024 == 0
    assert Pool(together=8).tokens(apart) > tokens
    assert Pool(together=4, page_size=64).tokens(apart) > tokens
    assert Pool(together=4).tokens(apart, copies=50) > Pool(together=4).tokens(apart, more=20) > tokens
    assert Pool(together=4, least=12345).tokens(apart) == 12345


def test_requests_that_share_their_prefix_need_it_once() -> None:
    apart = requests(*((i, *range(2000)) for i in range(20)))
    shared = requests(*((*range(2000), i) for i in range(20)))
    assert Pool(together=1).tokens(shared) < Pool(together=1).tokens(apart) / 5


@pytest.mark.parametrize(
    "asked",
    [
        requests(*((i,) * 700 for i in range(100))),  # all of them do not fit
        requests((1, 2, 3), max_new_tokens=None),  # until the context is full
        requests((1,) * 60000),
        requests(*((1, i) for i in range(10)), max_new_tokens=100, n=64),
    ],
    ids=["distinct", "endless", "long", "samples"],
)
def test_what_may_need_all_of_the_default_has_it(asked: list[Request]) -> None:
    assert Pool(together=4).tokens(asked) == MAX_TOTAL_TOKENS


def test_what_the_user_chose_stays() -> None:
    assert left_open({"dtype": "float32", "max_total_tokens": None})
    assert not left_open({"max_total_tokens": 8192})
    assert not left_open({"mem_fraction_static": 0.4})
