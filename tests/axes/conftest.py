"""Batches by hand, and the fixtures of `tests/small_tokenizer.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from sglang_probe.axes.axis import Axis
from sglang_probe.axes.batch import Batch, Painted
from tests.small_tokenizer import tokenizer, with_template, write_lines

__all__ = ["make_batch", "tokenizer", "with_template", "write_lines"]

PREFILL, DECODE, RECOMPUTE, NONE = 0, 1, 2, 4


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """A batch of requests given as lists of token ids; a request is all prompt unless `prompt_len` says otherwise."""

    def make(
        *requests: Sequence[int],
        prompt_len: Sequence[int] | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        begin: Sequence[int] | None = None,
        painted: dict[str, list[tuple[int, int, int]]] | None = None,
    ) -> Batch:
        lengths = [len(r) for r in requests]
        length, phase = zip(*(spans or [(sum(lengths), PREFILL)]), strict=True)
        return Batch(
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            begin=np.array(begin or [0] * len(requests), dtype=np.int32),
            prompt_len=np.array(prompt_len or lengths, dtype=np.int32),
            span_length=np.array(length),
            span_phase=np.array(phase, dtype=np.uint8),
            token_id=np.array([i for r in requests for i in r], dtype=np.int32),
            painted={n: Painted(*np.array(p, dtype=np.int64).T) for n, p in (painted or {}).items()},
        )

    return make


@pytest.fixture
def classes() -> Callable[[Axis, Batch], list[str]]:
    """Class names that an axis gives to one batch, which is the whole workload."""

    def name(axis: Axis, batch: Batch) -> list[str]:
        axis.observe(batch)
        axis.begin()
        return [axis.classes[i] for i in axis.labels(batch)]

    return name
