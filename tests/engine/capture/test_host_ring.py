"""A range of host memory is lent for as long as anything refers to it, and no two that are lent share a byte."""

import gc
import random

import torch

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.capture.host_ring import HostRing

_POINT = "blocks.0.hook_resid_post"
_UNIT = 256


def filled(value: int, units: int = 1) -> torch.Tensor:
    return torch.full((units, _UNIT), value, dtype=torch.uint8)


def test_a_range_is_lent_until_the_last_view_of_it_is_gone() -> None:
    ring = HostRing(_UNIT, pinned=False)
    x = torch.arange(_UNIT // 4, dtype=torch.int32).view(torch.uint8).view(4, -1)
    host = ring.copy(x)
    assert host is not None
    assert torch.equal(host, x)
    view = host[1:, 4:8].view(torch.int32)
    del host
    gc.collect()
    assert ring.copy(filled(7)) is None
    assert view[0, 0] == _UNIT // 16 + 1
    del view
    gc.collect()
    assert ring.copy(filled(7)) is not None


def test_ranges_come_back_in_any_order_and_are_lent_again_in_the_first() -> None:
    ring = HostRing(3 * _UNIT, pinned=False)
    a, b, c = (ring.copy(filled(i)) for i in range(3))
    del b
    assert ring.copy(filled(9)) is None  # what was lent first is still out
    del a
    assert ring.copy(filled(9, units=2)) is not None
    assert c is not None
    assert int(c.unique()) == 2


def test_nothing_that_is_lent_is_overwritten() -> None:
    rng, ring = random.Random(0), HostRing(37 * _UNIT, pinned=False)
    kept: list[tuple[int, torch.Tensor]] = []
    refused = 0
    for i in range(2000):
        host = ring.copy(torch.full((rng.randrange(1, 6 * _UNIT),), i % 256, dtype=torch.uint8))
        refused += host is None
        if host is not None:
            kept.append((i % 256, host))
        while kept and (host is None or rng.random() < 0.45):
            kept.pop(rng.randrange(min(3, len(kept))))
            host = kept[0][1] if kept else ring.copy(filled(0))
        assert all(bool((h == value).all()) for value, h in kept)
    assert 0 < refused < 1500


def test_what_is_larger_than_the_memory_is_left_to_the_channel() -> None:
    assert HostRing(_UNIT, pinned=False).copy(filled(0, units=2)) is None


def test_rows_travel_through_the_ring_and_past_it() -> None:
    taps = GraphTaps({_POINT: (64, torch.float32)}, capacity=4, device="cpu", ring=HostRing(4 * _UNIT, pinned=False))
    past, found = [], []
    for n in (4, 4, 3):
        x = torch.full((n, 64), float(n))
        taps.arm()
        taps.write(_POINT, x)
        snapshot = taps.snapshot(n, replayed=False)
        snapshot.send(lambda rows: past.append(rows) or rows.clone())  # type: ignore[func-returns-value]
        snapshot.arrive()
        found.append((x, snapshot.finish()[_POINT]))
    assert len(past) == 2  # while the first has all of the memory
    assert all(torch.equal(x, rows) for x, rows in found)
