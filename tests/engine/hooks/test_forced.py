"""Which samples a forward replaces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks.instruments.forced import forced_tokens


@pytest.mark.parametrize(
    ("force", "end", "found"),
    [
        (None, 4, None),
        ((5, 6), 3, None),  # a chunk before the last: its sample is discarded
        ((5, 6), 4, ([0], [5])),
        ((5, 6), 5, ([0], [6])),
        ((5, 6), 6, None),  # all are decoded
        ((None, 6), 4, None),
    ],
)
def test_a_sample_is_replaced_where_its_output_number_is_prescribed(force: Any, end: int, found: Any) -> None:
    plan = SimpleNamespace(ends=[end], prompt_lens=[4])
    assert forced_tokens([Ask(force=force)], plan) == found  # type: ignore[arg-type]
