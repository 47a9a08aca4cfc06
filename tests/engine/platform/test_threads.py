"""Threads of a forward pass on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

pytest.importorskip("sglang")

from sglang_probe.engine.platform import threads
from sglang_probe.engine.platform.environment import PREFILL_THREADS, set_process_defaults


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})


def _forward(tokens: int, *, decode: bool = False) -> Any:
    mode = SimpleNamespace(is_decode=lambda: decode)
    return SimpleNamespace(forward_mode=mode, input_ids=torch.zeros(tokens, dtype=torch.long))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [(_forward(4096), 2), (_forward(threads.LEAST_TOKENS - 1), 1), (_forward(4096, decode=True), 1)],
    ids=["long prefill", "short prefill", "decode"],
)
def test_a_long_prefill_has_several_threads_and_nothing_else_has(forward: Any, expected: int) -> None:
    chooser = threads.ForwardThreads({PREFILL_THREADS: "2"})
    for before in (_forward(4096), _forward(8, decode=True)):
        chooser.choose(before)
        chooser.choose(forward)
        assert torch.get_num_threads() == expected


@pytest.mark.parametrize(("env", "expected"), [({}, 1), ({PREFILL_THREADS: "64"}, 4)], ids=["nothing set", "too many"])
def test_there_are_never_more_than_asked_or_than_cpus(env: dict[str, str], expected: int) -> None:
    threads.ForwardThreads(env).choose(_forward(4096))
    assert torch.get_num_threads() == expected


def test_who_sets_the_threads_of_openmp_has_as_many_for_everything() -> None:
    env = {"OMP_NUM_THREADS": "1"}
    set_process_defaults(env)
    assert PREFILL_THREADS not in env
    env = {}
    set_process_defaults(env)
    assert env[PREFILL_THREADS] == "2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [256, 777])
def test_threads_change_no_bit(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    x_ND, w_MD = torch.randn(tokens, 256, dtype=dtype), torch.randn(704, 256, dtype=dtype)
    q, k, v = (torch.randn(1, heads, tokens, 32, dtype=dtype) for heads in (8, 4, 4))
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        found.append((linear(x_ND, w_MD), attended, torch.softmax(x_ND.float(), -1), x_ND.float().pow(2).mean(-1)))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
