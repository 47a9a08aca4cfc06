"""Telemetry of decode steps on attention that is known exactly."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_probe.attention import telemetry
from sglang_probe.errors import ProbeError
from tests.eviction.toy import LENGTH, STEPS, toy


def uniform(length: int, steps: int) -> torch.Tensor:
    a = torch.ones(steps, length + steps, dtype=torch.float64).tril(length)
    return a / a.sum(-1, keepdim=True)


def test_uniform_attention_has_entropy_1_and_the_support_of_all_visible_keys() -> None:
    e = telemetry.entropy(uniform(6, 3), 6)
    assert e.normalised.tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert e.support.tolist() == pytest.approx([7.0, 8.0, 9.0])


def test_a_sink_hides_the_entropy_that_the_other_keys_have() -> None:
    a = uniform(6, 2)
    a[:, 0] = 0.9
    a[:, 1:] *= (0.1 / a[:, 1:].sum(-1))[:, None]
    with_sink, without = telemetry.entropy(a, 6), telemetry.entropy(a, 6, sinks=1)
    assert without.normalised.tolist() == pytest.approx([1.0, 1.0])
    h = -0.9 * math.log(0.9) - 0.1 * math.log(0.1 / 6)
    assert with_sink.normalised[0].item() == pytest.approx(h / math.log(7))


def test_attention_on_one_key_has_entropy_0() -> None:
    a = torch.zeros(1, 4)
    a[0, 2] = 1.0
    assert telemetry.entropy(a, 3).normalised.item() == 0.0
    assert telemetry.entropy(a, 3).support.item() == 1.0


def test_top_positions_come_best_first_and_early_first() -> None:
    positions, weights = telemetry.top_positions(torch.tensor([[0.1, 0.4, 0.1, 0.4]]), 3)
    assert positions.tolist() == [[1, 3, 0]]
    assert weights.tolist() == [pytest.approx([0.4, 0.4, 0.1])]


def test_masses_by_region_add_up_to_1() -> None:
    a = toy().future_attention
    region = torch.tensor([0, 0] + [1] * 4 + [2] * 6 + [3] * STEPS)
    mass = telemetry.mass_by_region(a, region, 4)
    torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:-1], dtype=torch.float64))
    torch.testing.assert_close(mass[..., 1], a[..., 2:6].sum(-1))
    torch.testing.assert_close(mass[..., 3], a[..., LENGTH:].sum(-1))
    with pytest.raises(ProbeError, match="number all 17 keys"):
        telemetry.mass_by_region(a, region[:-1], 4)


def phases(seed: int, steps: int = 40, jump: int = 25) -> torch.Tensor:
    """Attention with noise around one distribution, and around another one from step `jump` on."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.rand(2, 30, generator=g) ** 3
    which = torch.zeros(steps, dtype=torch.long)
    which[jump:] = 1
    noisy = centres[which] * torch.exp(0.3 * torch.randn(steps, 30, generator=g))
    a = torch.zeros(steps, 30 + steps)
    a[:, :30] = noisy / noisy.sum(-1, keepdim=True)
    return a


def test_a_jump_is_where_the_attention_changes_for_good() -> None:
    a = torch.stack([phases(s) for s in range(6)])
    z = telemetry.jump_scores(a, 30)
    assert z[:, :4].isnan().all()
    assert (z.nan_to_num(0).argmax(-1) == 25).all()
    # By hand at one step: divergence from the mean of the four steps before.
    from sglang_probe.stats.distance import jensen_shannon

    torch.testing.assert_close(z[2, 10], jensen_shannon(a[2, 10, :30], a[2, 6:10, :30].mean(0)))


def test_a_response_shorter_than_the_memory_has_no_jump() -> None:
    assert telemetry.jump_scores(uniform(5, 4), 5, memory=4).isnan().all()
