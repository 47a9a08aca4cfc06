"""Change points in attention that is made to change, and in attention that is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.stats.distance import jensen_shannon
from sglang_probe.studies.query_drift.change_point import change_point, cusum

LENGTH, STEPS = 30, 40


def responses(heads: int, *, at: int | None, seed: int, noise: float = 0.5) -> Tensor:
    """Attention `[heads, T, L + T]`: noise around one distribution, around another one from step `at` on."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.rand(heads, 2, LENGTH, generator=g) ** 3
    which = (torch.arange(STEPS) >= at).long() if at is not None else torch.zeros(STEPS, dtype=torch.long)
    prompt = centres[:, which] * torch.exp(noise * torch.randn(heads, STEPS, LENGTH, generator=g))
    return torch.cat([prompt / prompt.sum(-1, keepdim=True), torch.zeros(heads, STEPS, STEPS)], -1)


def test_the_statistic_of_a_hand_computed_split() -> None:
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    found = cusum(p, 1)
    assert len(found) == 3
    # Behind step 2: (2 * 2 / 16) of the divergence between (1, 0) and (1/4, 3/4).
    assert found[1].item() == pytest.approx(0.25 * jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75])))
    apart = cusum(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 1)
    assert apart.tolist() == [pytest.approx(0.25 * math.log(2))]


@pytest.mark.parametrize("at", [9, 20, 31])
def test_an_injected_jump_is_found_where_it_is(at: int) -> None:
    found = change_point(responses(24, at=at, seed=at), LENGTH)
    assert (found.step == at).float().mean() > 0.9
    assert (found.p_value == 0.05).all()  # the smallest that 19 permutations allow


def test_without_a_jump_the_false_alarms_are_as_many_as_the_level_says() -> None:
    found = change_point(responses(400, at=None, seed=1), LENGTH, permutations=19)
    assert 0.02 < (found.p_value <= 0.05).float().mean() < 0.09


def test_a_jump_in_shuffled_steps_is_no_jump() -> None:
    order = torch.randperm(STEPS, generator=torch.Generator().manual_seed(0))
    shuffled = responses(200, at=20, seed=2)[:, order]
    assert (change_point(shuffled, LENGTH).p_value <= 0.05).float().mean() < 0.12


def test_only_the_prompt_counts() -> None:
    a = responses(4, at=20, seed=3)
    a[..., LENGTH:] = torch.rand(4, STEPS, STEPS)
    a[..., :LENGTH] *= 0.1
    assert (change_point(a, LENGTH).step == 20).all()


def test_a_short_response_has_no_change_point() -> None:
    with pytest.raises(ProbeError, match="8 steps; there are 7"):
        change_point(responses(1, at=None, seed=0)[:, :7], LENGTH)
