"""The backend beside SGLang's own: the same bits for requests without a kept set, whoever shares their batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_probe import bf16
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.platform import kept_rows
from sglang_probe.engine.platform.kept_rows import KeptRow
from sglang_probe.kept_set import Kept

HEADS, KV_HEADS, DIM, POOL = 8, 4, 32, 2000
PREFIX, NEW = [0, 130, 77, 300, 64], [70, 1, 40, 33, 90]
TOTAL = [p + n for p, n in zip(PREFIX, NEW, strict=True)]


@pytest.fixture(autouse=True)
def _stock_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bf16.VARIABLE, "bf16")  # what is compared with the stock backend, on any CPU


def _batch(dtype: torch.dtype) -> SimpleNamespace:
    g = torch.Generator().manual_seed(0)
    table = torch.zeros(len(TOTAL), 512, dtype=torch.int32)
    free = torch.randperm(POOL, generator=g).int()
    for i, n in enumerate(TOTAL):
        table[i, :n], free = free[:n], free[n:]
    pools = [torch.randn(POOL, KV_HEADS, DIM, generator=g).to(dtype) for _ in range(2)]
    return SimpleNamespace(
        table=table,
        pools=pools,
        requests=torch.tensor([3, 0, 4, 1, 2]),
        decode=torch.randn(len(TOTAL), HEADS, DIM, generator=g).to(dtype),
        extend=torch.randn(sum(NEW), HEADS, DIM, generator=g).to(dtype),
    )


def _order(values: list[int], batch: SimpleNamespace) -> Tensor:
    return torch.tensor(values)[batch.requests]


def _run(backend: Any, batch: SimpleNamespace, mode: str) -> Tensor:
    lengths = [_order(TOTAL, batch)]
    if mode == "extend":
        lengths += [_order(PREFIX, batch), _order(NEW, batch)]
    query = getattr(batch, mode)
    run = getattr(backend, f"_run_sdpa_forward_{mode}")
    options = {"scaling": DIM**-0.5, "enable_gqa": True, "causal": mode == "extend", "is_cross_attn": False}
    pools = (*batch.pools, batch.table, batch.requests)
    out: Tensor = run(query, torch.empty_like(query), *pools, *lengths, None, **options, sliding_window_size=None)
    return out


def _rows(batch: SimpleNamespace, evicted: list[int], mode: str, share: float) -> list[KeptRow]:
    rows = []
    for row in evicted:
        request = int(batch.requests[row])
        start = TOTAL[request] - 1 if mode == "decode" else PREFIX[request]
        keep = torch.rand(1, 2, KV_HEADS, 60, generator=torch.Generator().manual_seed(row)) < share
        rows.append(KeptRow(row, f"r{row}", 0, Kept(keep), start, TOTAL[request]))
    return rows


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stock and ours on the same batch; the third makes ours attend to kept sets."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from sglang_probe.engine.platform.attention import ProbeTorchBackend

    def make(batch: SimpleNamespace, rows: list[KeptRow], mode: str) -> tuple[Any, Any]:
        runner = SimpleNamespace(
            device="cpu",
            dtype=batch.decode.dtype,
            req_to_token_pool=SimpleNamespace(req_to_token=batch.table),
            token_to_kv_pool=None,
        )
        ours = ProbeTorchBackend(runner)
        monkeypatch.setattr(guard, "session", SimpleNamespace(recorder=object(), fail=_fail))
        monkeypatch.setattr(kept_rows, "at_hand", rows)
        ours.init_forward_metadata(
            SimpleNamespace(
                out_cache_loc=None,
                seq_lens=_order(TOTAL, batch),
                req_pool_indices=batch.requests,
                forward_mode=SimpleNamespace(is_decode=lambda: mode == "decode"),
            )
        )
        return TorchNativeAttnBackend(runner), ours

    return make


def _fail(where: str, error: BaseException) -> None:
    raise AssertionError(where) from error


def _by_request(out: Tensor, batch: SimpleNamespace, mode: str) -> tuple[Tensor, ...]:
    return out.split([1] * len(TOTAL) if mode == "decode" else _order(NEW, batch).tolist())


@pytest.mark.parametrize(
    ("mode", "dtype"), [("decode", torch.float32), ("decode", torch.bfloat16), ("extend", torch.bfloat16)]
)
def test_requests_without_a_kept_set_have_the_stock_bits(backends: Any, mode: str, dtype: torch.dtype) -> None:
    batch = _batch(dtype)
    for evicted in ([], [1, 4], [0, 2, 3]):
        stock, ours = backends(batch, _rows(batch, evicted, mode, 0.3), mode)
        expected, found = (_by_request(_run(b, batch, mode), batch, mode) for b in (stock, ours))
        for row, (a, b) in enumerate(zip(expected, found, strict=True)):
            assert torch.equal(a, b) == (row not in evicted), row


def test_in_float32_prefill_behind_a_prefix_has_the_stock_rows_to_rounding_and_ours_to_the_bit(backends: Any) -> None:
    """PyTorch's kernel cuts the queries into blocks by their number, and stock pads them to the full length."""
    batch = _batch(torch.float32)
    stock, ours = backends(batch, [], "extend")
    expected, alone = (_by_request(_run(b, batch, "extend"), batch, "extend") for b in (stock, ours))
    for row, (a, b) in enumerate(zip(expected, alone, strict=True)):
        assert torch.allclose(a, b, atol=1e-5)
        assert PREFIX[batch.requests[row]] or torch.equal(a, b)
    _, ours = backends(batch, _rows(batch, [1, 4], "extend", 0.3), "extend")
    for row, (a, b) in enumerate(zip(alone, _by_request(_run(ours, batch, "extend"), batch, "extend"), strict=True)):
        assert torch.equal(a, b) == (row not in (1, 4)), row


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("mode", ["decode", "extend"])
def test_a_budget_of_everything_is_the_full_cache_to_rounding(
    backends: Any, mode: str, dtype: torch.dtype, rounding: float
) -> None:
    batch = _batch(dtype)
    stock, ours = backends(batch, _rows(batch, [0, 1, 2, 3, 4], mode, 1.1), mode)
    expected, found = (_run(b, batch, mode).float() for b in (stock, ours))
    assert (found - expected).norm() / expected.norm() < rounding


def test_a_batch_that_was_not_planned_so_stops_the_recording(backends: Any) -> None:
    batch = _batch(torch.float32)
    (row,) = _rows(batch, [1], "decode", 0.3)
    late = KeptRow(row.row, row.rid, row.attempt, row.kept, row.start + 1, row.end + 1)
    with pytest.raises(AssertionError, match="_rows_with_kept_sets"):
        backends(batch, [late], "decode")


def test_steps_of_a_changing_batch_are_those_of_each_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests join, end, pause behind a prefill, come back after a retraction and under an id that was used before.

    The new entry of a step is written after `init_forward_metadata`, as the layers do.
    """
    from sglang_probe.engine.platform.attention import ProbeTorchBackend

    g = torch.Generator().manual_seed(5)
    layers, table = 2, torch.zeros(8, 256, dtype=torch.int32)
    pools = [[torch.randn(POOL, KV_HEADS, DIM, generator=g) for _ in range(2)] for _ in range(layers)]
    runner = SimpleNamespace(
        device="cpu",
        dtype=torch.float32,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        token_to_kv_pool=None,
    )
    ours = ProbeTorchBackend(runner)
    free = torch.randperm(POOL, generator=g).int()

    def admit(index: int, length: int, steps: int = 1) -> tuple[int, Kept]:
        nonlocal free
        table[index, : length + 40], free = free[: length + 40], free[length + 40 :]
        share = torch.rand(1, layers, KV_HEADS, 1, generator=g)
        return index, Kept(torch.rand(steps, layers, KV_HEADS, length, generator=g) < share)

    a, b, c, d = admit(0, 30), admit(1, 55), admit(2, 18, steps=4), admit(3, 41)
    b_retracted = (admit(4, 55)[0], b[1])
    a_anew = (admit(5, 30)[0], a[1])  # the id and the kept set of a request that ended
    batches: list[list[tuple[str, int, tuple[int, Kept], int]]] = []  # id, attempt, slots and set, position behind it
    batches += [[("a", 0, a, s), ("b", 0, b, s + 3)] for s in range(3)]
    batches += [[("a", 0, a, 3), ("b", 0, b, 6), ("c", 0, c, 0)], [("c", 0, c, 1), ("b", 0, b, 7)]]
    batches += [[("c", 0, c, 2 + s), ("d", 0, d, s), ("b", 1, b_retracted, s)] for s in range(6)]
    batches += [[("a", 0, a_anew, s), ("d", 0, d, 6 + s)] for s in range(4)]
    for batch in batches:
        rows = [
            KeptRow(i, rid, attempt, kept, kept.length + s, kept.length + s + 1)
            for i, (rid, attempt, (_, kept), s) in enumerate(batch)
        ]
        requests = torch.tensor([index for _, _, (index, _), _ in batch])
        ends = torch.tensor([r.end for r in rows])
        monkeypatch.setattr(guard, "session", SimpleNamespace(recorder=object(), fail=_fail))
        monkeypatch.setattr(kept_rows, "at_hand", rows)
        mode = SimpleNamespace(is_decode=lambda: True)
        ours.init_forward_metadata(
            SimpleNamespace(out_cache_loc=None, seq_lens=ends, req_pool_indices=requests, forward_mode=mode)
        )
        for layer in range(layers):
            k_pool, v_pool = pools[layer]
            newest = table[requests, ends - 1].long()
            k_pool[newest], v_pool[newest] = torch.randn(2, len(rows), KV_HEADS, DIM, generator=g)
            query = torch.randn(len(rows), HEADS, DIM, generator=g)
            ours._layer = layer
            options = {"scaling": 0.2, "enable_gqa": True, "causal": False, "is_cross_attn": False}
            out = ours._run_sdpa_forward_decode(
                query, torch.empty_like(query), k_pool, v_pool, table, requests, ends, None, **options
            )
            for i, r in enumerate(rows):
                slots = table[requests[i], : r.end].long()
                step = min(r.start - r.kept.length, len(r.kept.keep_SYGN) - 1)
                seen_GL = torch.ones(KV_HEADS, r.end, dtype=torch.bool)
                seen_GL[:, : r.kept.length] = r.kept.keep_SYGN[step, layer]
                seen_HL = seen_GL.repeat_interleave(HEADS // KV_HEADS, 0)
                k, v = (x[slots].repeat_interleave(HEADS // KV_HEADS, 1) for x in (k_pool, v_pool))
                weights = (0.2 * torch.einsum("hd,lhd->hl", query[i], k)).masked_fill(~seen_HL, -torch.inf).softmax(-1)
                assert torch.allclose(out[i], torch.einsum("hl,lhd->hd", weights, v), atol=1e-5), (r.rid, r.start)
