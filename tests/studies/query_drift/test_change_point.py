"""Change points in attention that is made to change, and in attention that is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.stats.distance import jensen_shannon
from sglang_probe.studies.query_drift.change_point import block_order, change_point, cusum

LENGTH, STEPS = 30, 40


def responses(
    heads: int, *, at: int | None, seed: int, noise: float = 0.5, like: float = 0.0, steps: int = STEPS
) -> Tensor:
    """Attention `[heads, T, L + T]`: noise around one distribution, around another one from step `at` on; the noise of
    neighbouring steps correlates by `like`."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.rand(heads, 2, LENGTH, generator=g) ** 3
    which = (torch.arange(steps) >= at).long() if at is not None else torch.zeros(steps, dtype=torch.long)
    fresh = torch.randn(heads, steps, LENGTH, generator=g)
    noises = [fresh[:, 0]]
    for t in range(1, steps):
        noises.append(like * noises[-1] + math.sqrt(1 - like**2) * fresh[:, t])
    prompt = centres[:, which] * torch.exp(noise * torch.stack(noises, 1))
    return torch.cat([prompt / prompt.sum(-1, keepdim=True), torch.zeros(heads, steps, steps)], -1)


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
    assert (found.p_value == 0.025).all()  # the smallest that 39 permutations allow
    assert found.block.float().mean() < 1.2  # a jump is no autocorrelation


def test_without_a_jump_the_false_alarms_are_as_many_as_the_level_says() -> None:
    found = change_point(responses(400, at=None, seed=1), LENGTH, permutations=19)
    assert 0.02 < (found.p_value <= 0.05).float().mean() < 0.09


@pytest.mark.parametrize(("like", "steps"), [(0.3, 40), (0.6, 40), (0.6, 120)])
def test_likeness_of_neighbouring_steps_alone_is_no_change(like: float, steps: int) -> None:
    """Steps in random order, the null that this replaces, take 40 to 100 % of these for changes."""
    quiet = responses(200, at=None, seed=1, like=like, steps=steps)
    found = change_point(quiet, LENGTH)
    assert (found.p_value <= 0.05).float().mean() <= 0.13  # up to 10 % by simulation, and binomial error of 200
    assert found.block.float().mean() > 3
    jump = responses(50, at=steps // 2, seed=2, like=like, steps=steps)
    if steps > 40 or like < 0.5:
        assert (change_point(jump, LENGTH).p_value <= 0.05).float().mean() > 0.9


def test_an_order_of_blocks_holds_every_step_once_and_keeps_neighbours_together() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        order = block_order(41, 7, g)
        assert sorted(order.tolist()) == list(range(41))
        assert (order.diff() == 1).sum() >= 41 - 1 - 7  # at most seven blocks meet
    assert block_order(5, 1, g).tolist() != block_order(5, 1, g).tolist()


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
