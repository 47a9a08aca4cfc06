"""Batched telemetry of requests that come and go, against the definitions of `attention/telemetry.py` one by one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from sglang_probe.attention import telemetry as definitions
from sglang_probe.attention.run_telemetry import regions_of
from sglang_probe.engine.capture.telemetry import Memory, Steps, Telemetry, logits, top
from sglang_probe.run.telemetry_options import NUMBERS, REGIONS, TelemetryOptions

HEADS, LAYERS = 3, 2
CPU = torch.device("cpu")


@dataclass
class Request:
    rid: str
    prompt: int
    system: list[list[int]] | None
    logits: list[torch.Tensor] = field(default_factory=list)  # [layer, head, key] of each measured step
    steps: list[int] = field(default_factory=list)
    found: list[dict[str, torch.Tensor]] = field(default_factory=list)


def serve(options: TelemetryOptions, requests: list[Request], schedule: list[list[int]]) -> None:
    """Measure the next step of the scheduled requests, forward by forward; one that is not scheduled again ends."""
    generator = torch.Generator().manual_seed(0)
    telemetry = Telemetry(list(range(LAYERS)), options)
    for number, batch in enumerate(schedule):
        mine = [requests[i] for i in batch]
        keys = np.array([r.prompt + options.every * len(r.steps) + 1 for r in mine])
        for r, n in zip(mine, keys.tolist(), strict=True):
            r.logits.append(torch.randn(LAYERS, HEADS, n, generator=generator) * 4)
            r.steps.append(n - 1 - r.prompt)
        padded = torch.full((LAYERS, len(mine), HEADS, int(keys.max())), 9.0)
        for b, r in enumerate(mine):
            padded[:, b, :, : keys[b]] = r.logits[-1]
        system = np.array([r.system or [[0, 0], [0, 0]] for r in mine])
        steps = Steps(
            np.arange(len(mine)),
            np.array([r.prompt for r in mine]),
            keys,
            system,
            np.array([r.system is not None for r in mine]),
        )
        rids = [r.rid for r in mine]
        out = telemetry.measure(steps, rids, lambda i, x=padded: x[i].clone(), CPU)  # type: ignore[misc]
        for b, r in enumerate(mine):
            r.found.append({name: x[:, b] for name, x in out.items()})
        for i in set(batch) - set(itertools.chain(*schedule[number + 1 :])):
            telemetry.memory.end(requests[i].rid)


def expected(r: Request, options: TelemetryOptions, layer: int) -> dict[str, torch.Tensor]:
    """The definitions, on the whole attention `[H, T, J]` of one request; numbers `[H, T]`."""
    length = r.prompt + r.steps[-1] + 1
    a = torch.zeros(HEADS, r.steps[-1] + 1, length, dtype=torch.float64)
    for step, x in zip(r.steps, r.logits, strict=True):
        a[:, step, : x.shape[-1]] = x[layer].double().softmax(-1)
    segments = np.full(length, "user", dtype=object)
    for begin, end in r.system or []:
        segments[begin:end] = "system"
    whole, rest = (definitions.entropy(a, r.prompt, sinks=s) for s in (0, options.sinks))
    mass = definitions.mass_by_region(a, regions_of(segments, r.prompt, options), len(REGIONS))
    numbers = {"entropy": whole.normalised, "entropy_without_sinks": rest.normalised, "support": whole.support}
    numbers |= {f"mass_{name}": mass[..., i] for i, name in enumerate(REGIONS)}
    numbers = {name: x[:, r.steps] for name, x in numbers.items()}
    numbers["jump"] = definitions.jump_scores(a[:, r.steps], r.prompt, memory=options.memory)
    return numbers


@pytest.mark.parametrize("every", [1, 3])
def test_numbers_are_those_of_the_definitions_while_requests_come_and_go(every: int) -> None:
    options = TelemetryOptions(sinks=2, window=5, top_k=4, memory=2, every=every)
    requests = [Request("a", 40, [[0, 9], [12, 15]]), Request("b", 17, [[0, 4], [0, 0]]), Request("c", 60, None)]
    requests += [Request("d", 25, [[3, 30], [0, 0]])]  # takes the place of one that has ended
    schedule = [[0, 1], [1, 0], [0, 1], [0], [0, 2], [3, 0, 2], [3, 2], [2, 3], [3, 2], [3]]
    serve(options, requests, schedule)
    compared = 0
    for r in requests:
        for layer in range(LAYERS):
            want = expected(r, options, layer)
            for name in NUMBERS:
                got = torch.stack([f[name][layer] for f in r.found], -1).double()
                if name == "mass_system" and r.system is None:
                    assert got.isnan().all()
                    continue
                assert torch.allclose(got, want[name], atol=2e-6, rtol=1e-5, equal_nan=True), (r.rid, name)
                compared += int((~got.isnan()).sum())
    assert compared > 900


def past(memory: Memory, places: np.ndarray, prompt: int) -> torch.Tensor:
    """Of the only layer, one head."""
    return memory.past(0, places, torch.from_numpy(places), torch.tensor(memory.fresh, dtype=torch.int64), 1, prompt)


def test_a_step_measured_again_after_a_retraction_has_no_jump() -> None:
    """Its own first measurement has taken the place of the oldest step before it: absent, not wrong."""
    memory = Memory(1, 3)
    places = memory.places(["a"])
    for step in range(5):
        assert memory.complete(places, np.array([step])).item() == (step >= 3)
        past(memory, places, 4)
        memory.remembered(places, np.array([step]))
    assert not memory.complete(places, np.array([4])).item()
    assert memory.complete(places, np.array([5])).item()


def test_what_an_ended_request_left_is_not_the_next_ones_past() -> None:
    memory = Memory(1, 2)
    at = memory.places(["a"])
    past(memory, at, 8)
    memory.remember(0, torch.from_numpy(at * 2), torch.ones(1, 1, 8))
    memory.remembered(at, np.array([0]))
    assert past(memory, at, 8).sum() == 8
    memory.end("a")
    again = memory.places(["b"])
    assert again.tolist() == at.tolist()
    assert not memory.complete(again, np.array([2])).item()
    assert past(memory, again, 8).sum() == 0


@pytest.mark.parametrize("length", [1, 3, 8, 9, 40, 257, 1000])
def test_top_positions_are_those_of_a_sort(length: int) -> None:
    a = torch.rand(5, 2, length, generator=torch.Generator().manual_seed(length)).softmax(-1)
    positions, weights = top(a, 8)
    n = min(8, length)
    want = a.sort(dim=-1, descending=True)
    assert torch.equal(weights[..., :n], want.values[..., :n])
    assert torch.equal(positions[..., :n], want.indices[..., :n].to(torch.int32))
    assert (positions[..., n:] == -1).all()
    assert (weights[..., n:] == 0).all()


def test_logits_follow_the_slots_and_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(50, 2, 4, generator=generator)
    q = torch.randn(3, 4 * 4, generator=generator)
    slots = torch.randint(0, 50, (3, 7), generator=generator)
    want = torch.einsum("bgrd,bjgd->bgrj", q.view(3, 2, 2, 4), pool[slots]).flatten(1, 2) * 0.5
    assert torch.allclose(logits(q, pool, slots, 0.5), want, atol=1e-5)
    monkeypatch.setattr("sglang_probe.engine.capture.telemetry._BLOCK_ELEMENTS", 7 * 8)  # one request at a time
    assert torch.allclose(logits(q, pool, slots, 0.5), want, atol=1e-5)
