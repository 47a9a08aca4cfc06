"""Cosines, the rotation-only null and excess drift, on queries whose drift is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sglang_probe.attention.rope import Rotary
from sglang_probe.studies.factorial.effects import factorial_effects
from sglang_probe.studies.query_drift.cosine import (
    centre,
    cosine_drift,
    nearest_cosine,
    prompt_mean,
    rotation_null,
    window_cosine,
)
from sglang_probe.studies.query_drift.excess import ExcessDrift, excess_drift

HEADS, DIM = 3, 16
ROTARY = Rotary(head_dim=DIM)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_the_window_cosine_is_that_to_the_mean_of_normalised_queries() -> None:
    q, w = rand(4, HEADS, DIM), rand(5, HEADS, DIM, seed=1)
    w[0] *= 100  # a long query must not rule the mean
    ours, nearest = window_cosine(q, w), nearest_cosine(q, w)
    for t in range(4):
        for h in range(HEADS):
            units = [w[i, h] / w[i, h].norm() for i in range(5)]
            mean = sum(units[1:], units[0]) / 5
            assert ours[t, h].item() == pytest.approx(plain_cosine(q[t, h].tolist(), mean.tolist()))
            each = [plain_cosine(q[t, h].tolist(), u.tolist()) for u in units]
            assert nearest[t, h].item() == pytest.approx(max(each))


def test_at_one_position_the_post_rope_cosine_is_the_pre_rope_cosine() -> None:
    q, w = rand(4, HEADS, DIM), rand(5, HEADS, DIM, seed=1)
    at = torch.full((9,), 77)
    same = cosine_drift(q, w, torch.zeros(HEADS, DIM).double(), ROTARY, decode_at=at[:4], window_at=at[4:])
    torch.testing.assert_close(same.post, same.pre, rtol=0, atol=1e-6)
    torch.testing.assert_close(same.pre_centred, same.pre)
    apart = cosine_drift(
        q, w, torch.zeros(HEADS, DIM).double(), ROTARY, decode_at=at[:4] + 50, window_at=torch.arange(72, 77)
    )
    torch.testing.assert_close(apart.pre, same.pre)
    assert (apart.post - apart.pre).abs().max() > 0.05


def test_a_shared_mean_makes_unrelated_queries_similar_until_it_is_taken_out() -> None:
    shared = 1.5 * rand(HEADS, DIM, seed=9)
    prompt = rand(400, HEADS, DIM) + shared
    prompt[:4] += 1000.0  # sinks, which the mean must leave out
    q, w = rand(200, HEADS, DIM, seed=1) + shared, prompt[-32:]
    mean = prompt_mean(prompt)
    assert (mean - shared).norm() / shared.norm() < 0.1
    drift = cosine_drift(q, w, mean, ROTARY, decode_at=torch.arange(200), window_at=torch.arange(32))
    assert drift.pre.mean() > 0.7
    assert abs(drift.pre_centred.mean()) < 0.1
    assert drift.pre_centred_nearest.mean() > drift.pre_centred.mean() + 0.2  # nearest of 32 is biased upwards
    torch.testing.assert_close(centre(q, mean).mean(0), q.mean(0) - mean)


@pytest.mark.parametrize(
    ("dim", "base", "expected"),
    [
        (128, 5e5, [0.978, 0.796, 0.697, 0.602, 0.602, 0.470, 0.347, 0.217, 0.265, 0.210]),
        (128, 1e6, [0.979, 0.805, 0.717, 0.625, 0.538, 0.463, 0.324, 0.310, 0.334, 0.242]),
        (32, 1e4, [0.957, 0.658, 0.602, 0.537, 0.246, 0.017, 0.212, 0.034, 0.001, -0.013]),
    ],
)
def test_the_rotation_null_with_equal_energy_is_the_published_table(
    dim: int, base: float, expected: list[float]
) -> None:
    distances = torch.tensor([1, 8, 32, 64, 128, 512, 2048, 4424, 8192, 32768])
    null = rotation_null(Rotary(head_dim=dim, base=base), distances)
    assert null.tolist() == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("rotary", [ROTARY, Rotary(head_dim=DIM, rotary_dim=6, layout="interleaved")])
def test_the_rotation_null_of_a_query_is_its_cosine_to_itself_rotated(rotary: Rotary) -> None:
    q = rand(1, HEADS, DIM)
    distances = torch.tensor([1, 5, 40])
    null = rotation_null(rotary, distances, q)
    for x, distance in enumerate(distances):
        a, b = rotary.rotate(q, torch.tensor([0])), rotary.rotate(q, distance[None])
        for h in range(HEADS):
            assert null[h, x].item() == pytest.approx(plain_cosine(a[0, h].tolist(), b[0, h].tolist()), abs=1e-6)


def test_a_constant_query_follows_the_null_after_rope_and_does_not_drift_before_it() -> None:
    q = rand(1, HEADS, DIM).expand(60, HEADS, DIM)
    at = torch.arange(60)
    drift = cosine_drift(q[8:], q[7:8], torch.zeros(HEADS, DIM).double(), ROTARY, decode_at=at[8:], window_at=at[7:8])
    torch.testing.assert_close(drift.pre, torch.ones_like(drift.pre))
    torch.testing.assert_close(drift.post.mT, rotation_null(ROTARY, at[8:] - 7, q[:1]), rtol=0, atol=1e-6)


def walk(steps: int, seed: int) -> Tensor:
    """Queries that forget slowly: their cosine falls with distance alone."""
    x = [rand(HEADS, DIM, seed=seed)]
    noise = rand(steps, HEADS, DIM, seed=seed + 1)
    for i in range(1, steps):
        x.append(0.97 * x[-1] + math.sqrt(1 - 0.97**2) * noise[i])
    return torch.stack(x)


EDGES = torch.tensor([1, 10, 20, 40])


def excess(found: ExcessDrift) -> Tensor:
    """X(Δ), `[H, X]`."""
    return found.prompt_HX - found.decode_HX


def test_excess_drift_compares_means_over_pairs_at_the_distances_of_the_decode_pairs() -> None:
    q = rand(50, HEADS, DIM)
    at = torch.arange(50)
    result = excess_drift(q[:40], at[:40], q[40:], at[40:], window=8, edges=EDGES)

    def mean(pairs: list[tuple[int, int]], h: int) -> float:
        return sum(plain_cosine(q[i, h].tolist(), q[j, h].tolist()) for i, j in pairs) / len(pairs)

    for x, (low, high) in enumerate([(1, 10), (10, 20), (20, 40)]):
        decode = [(i, j) for i in range(32, 40) for j in range(40, 50) if low <= j - i < high]
        assert result.decode_pairs_X[x] == len(decode)
        if not decode:
            assert excess(result)[:, x].isnan().all()
            continue
        for h in range(HEADS):
            prompt = [mean([(k, k + j - i) for k in range(40 - (j - i))], h) for i, j in decode]
            assert result.prompt_HX[h, x].item() == pytest.approx(sum(prompt) / len(prompt))
            assert excess(result)[h, x].item() == pytest.approx(sum(prompt) / len(prompt) - mean(decode, h))


def test_queries_that_drift_with_distance_alone_show_no_excess_and_a_turn_at_decode_does() -> None:
    found = []
    for turned in (False, True):
        found_excess = []
        for seed in range(24):
            q = walk(260, 10 * seed)
            if turned:
                q[200:] = q[200:].roll(1, dims=-1)  # another direction from the first decode step on
            at = torch.arange(260)
            result = excess_drift(q[:200], at[:200], q[200:], at[200:], window=16, edges=EDGES)
            found_excess.append(excess(result).mean(0))
        found.append(torch.stack(found_excess))
    plain, turned_excess = found
    error = plain.std(0) / math.sqrt(24)
    assert (plain.mean(0).abs() < 4 * error).all()
    assert (turned_excess.mean(0) > 10 * error).all()


def test_positions_that_were_reused_are_missing_and_not_guessed() -> None:
    q = rand(50, HEADS, DIM)
    at = torch.arange(50)
    computed = torch.tensor([i for i in range(40) if not 5 <= i < 30])
    result = excess_drift(q[computed], at[computed], q[40:], at[40:], window=8, edges=EDGES)
    whole = excess_drift(q[:40], at[:40], q[40:], at[40:], window=8, edges=EDGES)
    torch.testing.assert_close(result.decode_HX[:, 0], whole.decode_HX[:, 0])
    assert result.prompt_pairs_X[0] < whole.prompt_pairs_X[0]
    # No two computed prompt positions are 10 to 20 apart, so there is nothing to compare with, and no number.
    assert excess(result)[:, 1].isnan().all()
    assert not excess(whole)[:, 1].isnan().any()


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ((1, 0.7238, 0.3522, 0.3267), (0.151, 0.522, 0.251)),  # DapQ table 1, post-RoPE
        ((1, 0.7238, 0.7913, 0.7434), (0.162, 0.095, 0.228)),  # the same before RoPE: content outweighs position
        ((1, 0.7236, 0.7359, 0.7192), (0.147, 0.134, 0.260)),  # table 6, before RoPE
    ],
)
def test_factorial_effects_of_published_tables(
    cells: tuple[float, float, float, float], expected: tuple[float, float, float]
) -> None:
    ss, ds, sd, dd = cells
    effects = factorial_effects(ss=ss, ds=ds, sd=sd, dd=dd)
    assert (effects.content, effects.position, effects.interaction) == pytest.approx(expected, abs=6e-4)
