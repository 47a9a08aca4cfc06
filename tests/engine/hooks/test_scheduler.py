"""What the engine says of a request that ended."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest

from sglang_probe.engine.hooks.scheduler import end_of


@pytest.mark.parametrize(
    ("ids", "reason", "told"),
    [
        ([5, 6, 7], None, "stop"),
        ([5, 6, 7], "abort", "abort"),
        ([0], None, "refused"),  # SGLang put one token in the place of a prompt of three
        ([0], "abort", "refused"),  # and its client dropped it before that ran (attack, seed 307)
    ],
)
def test_a_refused_prompt_is_told_from_what_was_asked(ids: list[int], reason: str | None, told: str) -> None:
    req = SimpleNamespace(
        rid="r",
        origin_input_ids=array("q", ids),
        origin_input_ids_unpadded=array("q", [5, 6, 7]),
        output_ids=array("q"),
        cached_tokens=0,
        retraction_count=0,
        finished_reason=SimpleNamespace(to_json=lambda: {"type": "stop"}),
    )
    assert end_of(req, reason).finish_reason == told
