"""Subspace and functional drift on queries whose directions are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.studies.query_drift.functional import functional_drift
from sglang_probe.studies.query_drift.subspace import phase_ratio, split_half_energy, subspace_drift

HEADS, DIM = 2, 12


def within(directions: list[int], n: int, seed: int) -> Tensor:
    """Queries that lie in some coordinate directions."""
    q = torch.zeros(n, HEADS, DIM, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    q[..., directions] = torch.randn(n, HEADS, len(directions), generator=g, dtype=torch.float64)
    return q


def test_queries_within_the_window_are_captured_whole_and_orthogonal_ones_not_at_all() -> None:
    window = within([0, 1, 2], 20, 0)
    same = subspace_drift(window, within([0, 1, 2], 30, 1), energy=0.9999)
    assert same.rank.tolist() == [3, 3]
    torch.testing.assert_close(same.captured, torch.ones(HEADS, dtype=torch.float64))
    torch.testing.assert_close(same.angle_cosines, torch.ones(HEADS, 3, dtype=torch.float64))
    assert same.chordal.max() < 1e-6
    other = subspace_drift(window, within([5, 6, 7], 30, 1), energy=0.9999)
    assert other.captured.abs().max() < 1e-12
    assert other.chordal.tolist() == pytest.approx([math.sqrt(3)] * 2)
    half = subspace_drift(window, within([0, 5], 4000, 1), energy=0.9999)
    assert half.captured.tolist() == pytest.approx([0.5, 0.5], abs=0.05)


def test_a_known_turn_gives_its_angle() -> None:
    window, decode = within([0], 10, 0), torch.zeros(10, HEADS, DIM, dtype=torch.float64)
    decode[..., 0], decode[..., 3] = math.cos(0.3), math.sin(0.3)
    drift = subspace_drift(window, decode)
    assert drift.angle_cosines.tolist() == [[pytest.approx(math.cos(0.3))]] * 2
    assert drift.captured.tolist() == pytest.approx([math.cos(0.3) ** 2] * 2)
    assert drift.chordal.tolist() == pytest.approx([math.sin(0.3)] * 2)


def test_the_rank_holds_the_asked_energy_and_at_most_half_the_window() -> None:
    window = within(list(range(DIM)), 8, 0)
    assert (subspace_drift(window, window, energy=0.999).rank == 4).all()
    scaled = within([0, 1], 40, 0)
    scaled[..., 1] *= 0.01
    assert (subspace_drift(scaled, scaled, energy=0.9).rank == 1).all()
    # Heads may differ in rank, and each is judged by its own.
    scaled[:, 1] = within([0, 1, 2], 40, 1)[:, 1]
    drift = subspace_drift(scaled, scaled, energy=0.999)
    assert drift.rank.tolist() == [1, 3]
    alone = subspace_drift(scaled[:, :1], scaled[:, :1], energy=0.999)
    assert drift.captured[0] == pytest.approx(float(alone.captured[0]))
    assert drift.chordal[0] == pytest.approx(float(alone.chordal[0]), abs=1e-7)


def test_isotropic_queries_are_captured_at_the_null_level() -> None:
    window = within(list(range(DIM)), 12, 0)
    drift = subspace_drift(window, within(list(range(DIM)), 5000, 1))
    assert drift.captured.tolist() == pytest.approx(drift.captured_null.tolist(), abs=0.03)


def test_the_split_half_null_is_below_1_where_a_window_is_short() -> None:
    window = within(list(range(DIM)), 16, 0)
    assert 0.2 < split_half_energy(window).mean() < 0.7
    assert split_half_energy(within([0, 1], 16, 0), energy=0.9999).min() > 0.999
    torch.testing.assert_close(split_half_energy(window), subspace_drift(window[::2], window[1::2]).captured)


def test_phases_in_other_directions_leave_more_uncaptured_than_halves_of_one_phase() -> None:
    noise = 0.1 * within(list(range(DIM)), 80, 3)
    label = torch.arange(80) // 40
    same = phase_ratio(within([0, 1], 80, 0) + noise, label)
    differ = phase_ratio(torch.cat([within([0, 1], 40, 0), within([4, 5], 40, 1)]) + noise, label)
    assert (same - 1).abs().max() < 0.3
    assert differ.min() > 5
    with pytest.raises(ProbeError, match="two phases"):
        phase_ratio(noise, torch.zeros(80))


def test_a_single_query_spans_no_subspace() -> None:
    with pytest.raises(ProbeError, match="at least two"):
        subspace_drift(within([0], 1, 0), within([0], 5, 0))


def test_functional_drift_is_the_root_mean_square_change_of_the_logits_after_their_mean() -> None:
    g = torch.Generator().manual_seed(0)
    q, w = (torch.randn(n, 4, DIM, generator=g, dtype=torch.float64) for n in (3, 5))
    k = torch.randn(7, 2, DIM, generator=g, dtype=torch.float64)
    ours = functional_drift(q, w, k)
    assert ours.shape == (3, 4)
    for t in range(3):
        for h in range(4):
            logits = [float((q[t, h] - w[:, h].mean(0)) @ k[j, h // 2]) / math.sqrt(DIM) for j in range(7)]
            mean = sum(logits) / 7
            expected = math.sqrt(sum((x - mean) ** 2 for x in logits) / 7)
            assert ours[t, h].item() == pytest.approx(expected)


def test_functional_drift_ignores_what_a_softmax_ignores() -> None:
    g = torch.Generator().manual_seed(0)
    q, w = (torch.randn(n, 4, DIM, generator=g, dtype=torch.float64) for n in (3, 5))
    k = torch.randn(7, 2, DIM, generator=g, dtype=torch.float64)
    torch.testing.assert_close(functional_drift(q, w, k + torch.randn(DIM, generator=g)), functional_drift(q, w, k))
    unseen = torch.linalg.svd(k[:, 0] - k[:, 0].mean(0)).Vh[-1]  # orthogonal to all differences of keys of head 0
    moved = q.clone()
    moved[:, :2] += 50 * unseen
    torch.testing.assert_close(functional_drift(moved, w, k)[:, :2], functional_drift(q, w, k)[:, :2])
