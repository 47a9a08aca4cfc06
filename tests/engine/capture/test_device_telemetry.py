"""Telemetry that is enqueued and never waited for, against what the reference platform measures of the same steps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_probe.engine.capture.attention_reference import attention_summary
from sglang_probe.engine.capture.device_telemetry import DeviceTelemetry, TelemetryOnTheWay, region_ends, upload_all
from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.capture.telemetry import Measured, Steps, Telemetry, logits
from sglang_probe.errors import LedgerError
from sglang_probe.run.telemetry_options import NUMBERS, REGIONS, TelemetryOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "hooks/plugin"))

from no_device_reads import without_reads

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 8, 2
OPTIONS = TelemetryOptions(sinks=3, window=5, top_k=4, memory=2, every=2)
# rid, prompt, ranges of the system prompt; a prompt shorter than the sinks, ranges that overlap and are in no order
REQUESTS = {"a": (40, [[0, 9], [12, 15]]), "b": (70, None), "c": (2, [[0, 1]]), "d": (25, [[20, 23], [1, 8], [5, 12]])}


def steps_of(rids: list[str], step: dict[str, int], at: list[int]) -> Steps:
    ranges = [REQUESTS[r][1] or [] for r in rids]
    system = np.zeros((len(rids), max(1, *map(len, ranges)), 2), dtype=np.int64)
    for row, found in zip(system, ranges, strict=True):
        row[: len(found)] = found or 0
    prompt = np.array([REQUESTS[r][0] for r in rids])
    keys = prompt + np.array([step[r] for r in rids]) * OPTIONS.every + 1
    return Steps(np.array(at), prompt, keys, system, np.array([REQUESTS[r][1] is not None for r in rids]))


def host(packed: torch.Tensor) -> dict[str, torch.Tensor]:
    n, k = len(NUMBERS), OPTIONS.top_k
    found = {name: packed[..., i] for i, name in enumerate(NUMBERS)}
    return found | {"top_positions": packed[..., n : n + k].view(torch.int32), "top_weights": packed[..., n + k :]}


def serve(schedule: list[list[str]], most_bytes: int = 1 << 30) -> list[tuple[list[str], dict, dict]]:
    """Both measurements of every forward; a request that is not scheduled again ends."""
    generator = torch.Generator().manual_seed(0)
    reference = Telemetry(list(range(LAYERS)), OPTIONS)
    device = DeviceTelemetry(
        list(range(LAYERS)), OPTIONS, heads=HEADS, device=CPU, summarise=attention_summary, most_bytes=most_bytes
    )
    pools = [torch.randn(600, KV_HEADS, DIM, generator=generator) for _ in range(LAYERS)]
    table = torch.randperm(600, generator=generator)[: 4 * 128].view(4, 128).int()
    place = {rid: i for i, rid in enumerate(REQUESTS)}
    step = dict.fromkeys(REQUESTS, 0)
    both = []
    for number, rids in enumerate(schedule):
        batch = ["x", *rids]  # a row that is not measured comes first
        requests_B = torch.tensor([place.get(r, 0) for r in batch])
        steps = steps_of(rids, step, list(range(1, len(batch))))
        queries = [torch.randn(len(rids), HEADS, DIM, generator=generator) * 3 for _ in range(LAYERS)]
        prepare, measure = without_reads(device.prepare), without_reads(device.measure)
        at = prepare(steps, steps.at, rids, requests_B, table)
        got = host(measure(at, queries, pools, [DIM**-0.5] * LAYERS))
        slots_BJ = table[requests_B[1:], : int(steps.keys.max())].long()

        def logits_of(i: int, slots_BJ: torch.Tensor = slots_BJ, queries: list = queries) -> torch.Tensor:
            return logits(queries[i].flatten(1), pools[i], slots_BJ, DIM**-0.5)

        both.append((rids, got, reference.measure(steps, rids, logits_of, CPU)))
        for rid in rids:
            step[rid] += 1
            if not any(rid in later for later in schedule[number + 1 :]):
                reference.memory.end(rid)
                device.memory.end(rid)
    return both


SCHEDULE = [
    ["a", "b"],
    ["b", "a"],
    ["a", "b", "c"],
    ["a", "c"],
    ["c", "a"],
    ["c", "d"],
    ["d"],
    ["d"],
    ["d", "b"],
    ["d"],
]


def test_numbers_are_those_of_the_reference_platform_while_requests_come_and_go() -> None:
    compared = 0
    for _, got, want in serve(SCHEDULE):
        assert set(got) == set(want)
        for name in (*NUMBERS, "top_weights"):
            assert torch.allclose(got[name], want[name], atol=2e-6, rtol=1e-5, equal_nan=True), name
            compared += int((~got[name].isnan()).sum())
        assert torch.equal(got["top_positions"], want["top_positions"])
    assert compared > 1000


def test_where_the_past_does_not_fit_there_is_no_jump_and_all_else_is() -> None:
    """Sixteen steps of prompts of up to 64 keys fit; those of request b have 70."""
    room = 4 * LAYERS * 8 * OPTIONS.memory * HEADS * 64
    jumps = 0
    for rids, got, want in serve(SCHEDULE, most_bytes=room):
        if "b" in rids:
            assert got["jump"].isnan().all()
        seen = ~got["jump"].isnan()
        jumps += int(seen.sum())
        assert torch.allclose(got["jump"][seen], want["jump"][seen], atol=2e-6)
        assert torch.allclose(got["entropy"], want["entropy"], atol=2e-6)
    assert jumps > 0


def test_regions_part_the_keys_as_the_definitions_do() -> None:
    steps = steps_of(list(REQUESTS), dict.fromkeys(REQUESTS, 2), [0, 1, 2, 3])
    ends, kinds = region_ends(steps, OPTIONS)
    for b, (prompt, system) in enumerate(REQUESTS.values()):
        j = np.arange(steps.keys[b])
        inside = np.any([(j >= s) & (j < e) for s, e in system or [[0, 0]]], 0)
        chosen = [j >= prompt, j < OPTIONS.sinks, j >= prompt - OPTIONS.window, inside]
        want = np.select(chosen, [REGIONS.index(r) for r in ("generated", "sinks", "window", "system")], default=2)
        run = np.searchsorted(ends[b], j, side="right")
        assert kinds[run].tolist() == want.tolist()
        without_sinks = ~np.isin(run, [0, len(kinds) - 2])
        assert without_sinks.tolist() == (j >= OPTIONS.sinks).tolist()
        assert ends[b, -1] == steps.keys[b]


def test_one_upload_holds_all_arrays() -> None:
    given = {"a": np.arange(3), "b": np.array([[1, 2], [3, 4]]), "none": np.empty(0, np.int64), "c": np.array([True])}
    found = upload_all(given, CPU)
    base = found["a"].data_ptr()
    for name, x in given.items():
        assert found[name].tolist() == x.astype(int).tolist()
        assert (found[name].data_ptr() - base) % 16 == 0 or not x.size
    assert len({x.untyped_storage().data_ptr() for x in found.values()}) == 1


def test_numbers_arrive_and_a_graph_without_the_tap_is_noticed() -> None:
    numbers = torch.randn(2, 3, HEADS, len(NUMBERS) + 2 * OPTIONS.top_k)
    taps = GraphTaps({"q0": (4, torch.float32), "q1": (6, torch.bfloat16)}, capacity=2, device="cpu")
    known = {"layers": [0, 1], "rids": list("abc"), "attempts": np.zeros(3), "positions": np.arange(3)}

    def arrived(written: list[str]) -> Measured:
        taps.arm()
        for name in written:
            taps.write(name, torch.ones(1, taps.columns[name].width, dtype=taps.columns[name].dtype))
        way = TelemetryOnTheWay(
            numbers, taps.marks(), list(taps.columns), OPTIONS.top_k, lambda **x: Measured(**known, **x)
        )
        with pytest.raises(LedgerError, match="had not arrived"):
            way.finish()
        way.send(torch.clone)
        way.arrive()
        return way.finish()

    measured = arrived(["q0", "q1"])
    want = host(numbers)
    for name in NUMBERS:
        assert np.array_equal(measured.numbers[name], want[name].numpy())
    assert np.array_equal(measured.top_positions, want["top_positions"].numpy())
    assert np.array_equal(measured.top_weights, want["top_weights"].numpy())
    with pytest.raises(LedgerError, match="hook point q1 was not written by the graph that was replayed"):
        arrived(["q0"])
