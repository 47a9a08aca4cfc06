"""Telemetry and eviction by lists of entries, on a model of a paged decode, against the reference platform's own."""

from __future__ import annotations

import importlib.util
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch

from sglang_probe.engine.capture.attention_reference import attention_summary
from sglang_probe.engine.capture.paged_decode import Decodes, TorchDecode, decodes_on
from sglang_probe.engine.capture.slot_lists import (
    RegionDecode,
    RegionLists,
    attend_by_lists,
    kept_lists,
    lists_of,
    log_base,
    try_kept,
)
from sglang_probe.engine.platform.kept_attention import attend_one_query
from sglang_probe.engine.platform.kept_entries import KeptEntries
from sglang_probe.engine.platform.kept_rows import KeptRow
from sglang_probe.engine.platform.kept_slots import KeptSlots
from sglang_probe.errors import UnsupportedError
from sglang_probe.kept_set import Kept

SLOTS, HEADS, KV_HEADS, DIM = 200, 6, 2, 16
SCALING = DIM**-0.5


def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def with_base(base: float = 2.0) -> Decodes:
    return Decodes(lambda: TorchDecode(base))


def test_lists_are_the_named_stretches_of_a_table() -> None:
    found = lists_of(torch.arange(10, 20).view(2, 5), np.array([1, 8]), np.array([3, 9]))
    assert found.indptr.tolist() == [0, 2, 3]
    assert found.entries.tolist() == [11, 12, 18]
    with pytest.raises(ValueError, match="empty"):
        lists_of(torch.arange(3), np.array([1]), np.array([1]))


@pytest.mark.parametrize("base", [2.0, math.e])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-2)])
def test_masses_and_entropies_by_region_are_those_of_the_reference(base: float, dtype: torch.dtype, off: float) -> None:
    lengths = np.array([70, 3, 41])
    ends = np.array([[4, 4, 30, 50, 70], [2, 2, 2, 2, 3], [4, 20, 20, 41, 41]])  # some regions are empty
    q, pool = made(3, HEADS, DIM, dtype=dtype), made(SLOTS, KV_HEADS, DIM, dtype=dtype)
    slots = torch.from_numpy(np.random.default_rng(0).permutation(SLOTS)[: 3 * 64].reshape(3, 64))
    slots = torch.cat([slots, slots[:, :6].flip(0)], 1)  # entries may be shared
    decodes = with_base(base)
    assert log_base(decodes, pool, HEADS, dtype) == base
    found = RegionLists(slots, ends).summary(decodes, q, pool, scaling=SCALING, base=base)
    true = attention_summary(
        q,
        pool,
        slots,
        torch.from_numpy(lengths),
        torch.from_numpy(ends),
        torch.arange(HEADS),
        scaling=SCALING,
        top_k=2,
    )
    torch.testing.assert_close(found.lse, true.lse, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(found.mass(), true.mass(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.mean_logit, true.mean_logit, atol=off, rtol=1e-6)
    torch.testing.assert_close(found.entropy(), true.entropy(), atol=off, rtol=1e-6)
    torch.testing.assert_close(found.entropy(without=(0,)), true.entropy(without=(0,)), atol=off, rtol=1e-6)
    assert found.top_positions.shape == found.top_weights.shape == (3, HEADS, 0)


def test_a_sum_to_a_base_that_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="neither to base 2 nor to base e"):
        log_base(with_base(10.0), made(SLOTS, KV_HEADS, DIM), HEADS, torch.float32)


def test_the_wrong_base_gives_other_masses() -> None:
    """So that the measurement of the base is no decoration."""
    q, pool, slots = made(1, HEADS, DIM), made(SLOTS, KV_HEADS, DIM), torch.arange(64)[None]
    ends = np.array([[8, 64]])
    right, wrong = (
        RegionLists(slots, ends).summary(with_base(2.0), q, pool, scaling=SCALING, base=base).mass()
        for base in (2.0, math.e)
    )
    assert float((right - wrong).abs().max()) > 0.01


def test_a_decode_that_is_wrong_is_refused_when_it_is_tried() -> None:
    class Shifted(TorchDecode):
        def plan(self, indptr: Any, indices: Any, *rest: Any, **options: Any) -> None:
            super().plan(indptr, (indices - 1).clamp(min=0), *rest, **options)

    shape: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}
    on_cpu: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    assert RegionDecode.tried(decodes_on(torch.device("cpu"), torch.float32, 3), **shape, **on_cpu).base == 2.0
    with pytest.raises(UnsupportedError, match="weights by region by lists of cache entries differ"):
        RegionDecode.tried(Decodes(Shifted), **shape, **on_cpu)
    with pytest.raises(UnsupportedError, match="kept sets by lists of cache entries differ"):
        try_kept(Decodes(Shifted), **shape, **on_cpu)
    assert try_kept(Decodes(TorchDecode), **shape, **on_cpu) < 1e-6


def test_what_a_kernel_cannot_do_is_a_refusal() -> None:
    class Lacking(TorchDecode):
        def plan(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("no kernel for heads of 80")

    shape: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}
    for tried in (RegionDecode.tried, try_kept):
        with pytest.raises(UnsupportedError, match="does not run here: RuntimeError: no kernel for heads of 80"):
            tried(Decodes(Lacking), **shape, dtype=torch.float32, device=torch.device("cpu"))


def test_without_flashinfer_a_gpu_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UnsupportedError, match="FlashInfer is not installed") as refused:
        decodes_on(torch.device("cuda"), torch.bfloat16, 4)
    assert "by: kernel" in str(refused.value)


def test_a_decode_is_not_planned_again_while_its_plan_is_still_being_copied() -> None:
    class Event:
        done = False

        def query(self) -> bool:
            return self.done

    decodes = Decodes(TorchDecode)
    four = lists_of(torch.arange(4), np.array([0]), np.array([4]))
    q, pool = torch.zeros(1, HEADS, DIM), torch.zeros(8, 1, KV_HEADS, DIM)
    first = four.planned(decodes, q, pool, 1.0)
    event = Event()
    decodes._planned[0] = (event, first)
    assert four.planned(decodes, q, pool, 1.0) is not first
    event.done = True
    assert four.planned(decodes, q, pool, 1.0) is first
    assert len(decodes._planned) == 2


def test_what_is_given_to_flashinfer_fits_its_own_signatures() -> None:
    flashinfer = pytest.importorskip("flashinfer")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    given: dict[str, Any] = {}

    class Noted(TorchDecode):
        def plan(self, *args: Any, **options: Any) -> None:
            given["plan"] = inspect.signature(wrapper._plan_impl).bind(self, *args, **options).arguments
            inspect.signature(wrapper.plan).bind(self, *args, **options)
            super().plan(*args, **options)

        def run(self, *args: Any, **options: Any) -> Any:
            inspect.signature(wrapper.run).bind(self, *args, **options)
            return super().run(*args, **options)

    inspect.signature(wrapper.__init__).bind(None, None, "NHD", backend="fa2", use_tensor_cores=True)
    log_base(Decodes(Noted), made(SLOTS, KV_HEADS, DIM), HEADS, torch.float32)
    assert (given["plan"]["page_size"], given["plan"]["num_kv_heads"]) == (1, KV_HEADS)
    assert {given["plan"][name].device.type for name in ("indptr", "last_page_len")} == {"cpu"}


def test_kept_sets_per_kv_head_attend_as_the_reference_platform_does() -> None:
    """Three requests, two layers, unequal kept sets, over several decode steps."""
    layers, rng = 2, np.random.default_rng(1)
    cache = [24, 9, 17]
    kept = []
    for n in cache:
        keep = torch.from_numpy(rng.random((1, layers, KV_HEADS, n)) < 0.4)
        keep[0, 0, 1] = False  # a head that keeps nothing of the prompt
        kept.append(Kept(keep))
    table = torch.from_numpy(rng.permutation(SLOTS)[: 3 * 40].reshape(3, 40))
    k_pool, v_pool = made(SLOTS, KV_HEADS, DIM), made(SLOTS + 1, KV_HEADS, DIM)[:SLOTS]
    slots: KeptSlots | None = None
    entries: KeptEntries | None = None
    for step in range(1, 6):
        ends = [n + step + i for i, n in enumerate(cache)]  # they are not equally far
        rows = [KeptRow(i, f"r{i}", 0, kept[i], e - 1, e) for i, e in enumerate(ends)]
        at = [table[i, :e] for i, e in enumerate(ends)]
        if slots is None or entries is None:
            slots = KeptSlots(rows, at, torch.float32)
            entries = KeptEntries(slots, torch.float32)
        else:
            assert slots.advance(rows, at)
        q = made(3, HEADS, DIM + step)[:, :, :DIM]
        for layer in range(layers):
            counts = np.stack([np.asarray(k.at(e - 1)[layer].sum(-1)) for k, e in zip(kept, ends, strict=True)])
            after = np.array(ends) - np.array(cache)
            lists = kept_lists(slots.entry[layer], counts, slots.width, after)
            assert lists.indptr.diff().tolist() == (counts + after[:, None]).ravel().tolist()
            found = attend_by_lists(with_base(), q, k_pool, v_pool, lists, SCALING)
            true = attend_one_query(q, *entries.of_layer(layer, k_pool, v_pool), SCALING)
            torch.testing.assert_close(found, true, atol=1e-6, rtol=1e-5)
            if step == 1 and layer == 1:  # another head's entries are another answer
                other = kept_lists(slots.entry[layer].flip(1), counts[:, ::-1].copy(), slots.width, after)
                wrong = attend_by_lists(with_base(), q, k_pool, v_pool, other, SCALING)
                assert float((wrong - true).abs().max()) > 0.1
