"""Attention to kept sets against a loop over every query, head and position; columns that go on from step to step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sglang_probe.engine.platform.kept_attention import attend_masked, attend_one_query, seen_behind_cache
from sglang_probe.engine.platform.kept_entries import KeptEntries
from sglang_probe.engine.platform.kept_rows import KeptRow
from sglang_probe.engine.platform.kept_slots import KeptSlots
from sglang_probe.kept_set import Kept

LAYERS, HEADS, KV_HEADS, DIM, POOL = 2, 6, 3, 4, 200
SCALING = 0.7


def _kept(length: int, *, steps: int = 1, share: float = 0.5, seed: int = 0) -> Kept:
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(steps, LAYERS, KV_HEADS, length, generator=g) < share
    keep[..., 0] = True
    return Kept(keep)


def _enumerated(q_HD: Tensor, k_LGD: Tensor, v_LGD: Tensor, kept: Kept, layer: int, position: int) -> Tensor:
    """One query, entry by entry."""
    out = []
    for head in range(HEADS):
        g = head // (HEADS // KV_HEADS)
        step = min(position - kept.length, len(kept.keep_SYGN) - 1)
        seen = [p for p in range(position + 1) if p >= kept.length or bool(kept.keep_SYGN[step, layer, g, p])]
        logits = [SCALING * float(q_HD[head] @ k_LGD[p, g]) for p in seen]
        e = [math.exp(x - max(logits)) for x in logits]
        out.append(sum(w / sum(e) * v_LGD[p, g] for w, p in zip(e, seen, strict=True)))
    return torch.stack(out)  # type: ignore[arg-type]


@pytest.fixture
def pool() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(9)
    return torch.randn(POOL, KV_HEADS, DIM, generator=g), torch.randn(POOL, KV_HEADS, DIM, generator=g)


def _slots(rows: int) -> Tensor:
    """Disjoint, shuffled slots of the requests: a position is not its slot."""
    return torch.randperm(POOL, generator=torch.Generator().manual_seed(3)).view(rows, -1).int()


def _rows(kepts: list[Kept], behind: list[int], rids: str = "abcd") -> list[KeptRow]:
    return [
        KeptRow(i, rids[i], 0, k, k.length + n - 1, k.length + n)
        for i, (k, n) in enumerate(zip(kepts, behind, strict=True))
    ]


KEPTS = [
    [_kept(9), _kept(17, seed=1), _kept(5, share=0.9, seed=2), _kept(12, steps=4, seed=3)],  # everything ragged
    [_kept(8, share=1.1), _kept(8, share=1.1)],  # no padding at all
    [_kept(30, share=0.05)],
]


@pytest.mark.parametrize("kepts", KEPTS)
def test_a_decode_step_is_what_enumeration_gives_and_so_are_the_next(
    kepts: list[Kept], pool: tuple[Tensor, Tensor]
) -> None:
    k_PGD, v_PGD = pool
    table = _slots(len(kepts)) if len(kepts) != 1 else _slots(4)[:1]
    behind = [1, 3, 2, 1][: len(kepts)] if len(kepts) != 2 else [2, 2]
    columns: KeptEntries | None = None
    for step in range(6):
        rows = _rows(kepts, [n + step for n in behind])
        slots = [table[i, : r.end] for i, r in enumerate(rows)]
        if columns is None:
            columns = KeptEntries(KeptSlots(rows, slots, torch.float32), torch.float32)
        else:
            assert columns.slots.advance(rows, slots)
        q_BHD = torch.randn(len(rows), HEADS, DIM, generator=torch.Generator().manual_seed(step))
        for layer in range(LAYERS):
            if layer == 1 and step == 3:
                continue  # a layer that missed a step copies anew
            out = attend_one_query(q_BHD, *columns.of_layer(layer, k_PGD, v_PGD), SCALING)
            for i, r in enumerate(rows):
                expected = _enumerated(q_BHD[i], k_PGD[slots[i]], v_PGD[slots[i]], r.kept, layer, r.end - 1)
                assert torch.allclose(out[i], expected, atol=1e-5)


def test_columns_taken_over_from_another_batch_are_those_built_anew() -> None:
    kepts = KEPTS[0]
    table = _slots(4)
    before = _rows(kepts, [1, 3, 2, 1])
    old = KeptSlots(before, [table[r.row, : r.end] for r in before], torch.float32)
    order = [2, 3, 0]
    rows = [KeptRow(i, "abcd"[j], 0, kepts[j], kepts[j].length + 4, kepts[j].length + 5) for i, j in enumerate(order)]
    slots = [table[j, : r.end] for j, r in zip(order, rows, strict=True)]
    taken, anew = KeptSlots(rows, slots, torch.float32, old), KeptSlots(rows, slots, torch.float32)
    for layer in range(LAYERS):
        bias, bias_anew = taken.bias(layer), anew.bias(layer)
        assert bias is not None
        assert bias_anew is not None
        assert torch.equal(bias, bias_anew)
        entry, entry_anew = (x.entry[layer, :, :, : x.end] for x in (taken, anew))
        assert torch.equal(entry[bias == 0], entry_anew[bias == 0])


def test_columns_without_padding_need_no_mask() -> None:
    rows = _rows(KEPTS[1], [2, 2])
    assert KeptSlots(rows, [_slots(2)[i, : r.end] for i, r in enumerate(rows)], torch.float32).bias(0) is None
    uneven = _rows(KEPTS[1], [2, 3])
    columns = KeptSlots(uneven, [_slots(2)[i, : r.end] for i, r in enumerate(uneven)], torch.float32)
    assert columns.bias(0) is not None


def test_columns_of_another_batch_are_not_gone_on_with() -> None:
    kepts = KEPTS[0][:2]
    table = _slots(2)

    def slots(rows: list[KeptRow]) -> list[Tensor]:
        return [table[r.row, : r.end] for r in rows]

    first = _rows(kepts, [1, 1])
    for following in (
        _rows(kepts, [2, 3]),  # a step was missed
        _rows(kepts, [2, 2], rids="ax"),
        _rows(kepts[:1], [2]),
        _rows([Kept(k.keep_SYGN) for k in kepts], [2, 2]),  # the same ids in another recording
        [KeptRow(r.row, r.rid, 1, r.kept, r.start, r.end) for r in _rows(kepts, [2, 2])],  # retracted
    ):
        columns = KeptSlots(first, slots(first), torch.float32)
        assert not columns.advance(following, slots(following))
    columns = KeptSlots(first, slots(first), torch.float32)
    for n in range(2, 66):
        assert columns.advance(_rows(kepts, [n, n]), slots(_rows(kepts, [n, n])))
    assert not columns.advance(_rows(kepts, [66, 66]), slots(_rows(kepts, [66, 66])))  # no room: built anew


@pytest.mark.parametrize("kept", [_kept(9), _kept(9, steps=3, seed=5)])
def test_prefill_behind_a_compressed_context_is_what_enumeration_gives(kept: Kept, pool: tuple[Tensor, Tensor]) -> None:
    slots = _slots(4)[0].long()
    start, end = 10, 15
    k_LGD, v_LGD = (x[slots[:end]] for x in pool)
    q_NHD = torch.randn(end - start, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    for layer in range(LAYERS):
        out = attend_masked(q_NHD, k_LGD, v_LGD, seen_behind_cache(kept, layer, start, end), SCALING)
        for n, p in enumerate(range(start, end)):
            expected = _enumerated(q_NHD[n], k_LGD, v_LGD, kept, layer, p)
            assert torch.allclose(out[n], expected, atol=1e-5)
