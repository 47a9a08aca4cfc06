"""The traffic of a proof, its hook points, and how its cost is told."""

from __future__ import annotations

import pytest

from sglang_probe.prove.config import default_points
from sglang_probe.prove.overhead import Overhead
from sglang_probe.prove.traffic import Habits, make_traffic


def test_traffic_follows_from_its_seed() -> None:
    habits = Habits(7, 60, bypass=True, samples=True)
    assert make_traffic(habits) == make_traffic(habits)
    assert make_traffic(habits) != make_traffic(Habits(8, 60, bypass=True, samples=True))


def test_traffic_shares_prefixes_has_twins_and_continues_conversations() -> None:
    traffic = make_traffic(Habits(7, 80, vocabulary=100, longest=200))
    prompts = [t.request.prompt_ids for t in traffic]
    assert len(set(prompts)) < len(prompts)
    assert any(a != b and a == b[: len(a)] for a in prompts for b in prompts)
    assert any(t.follows is not None for t in traffic)
    assert any(t.abort_after is not None for t in traffic)
    assert any(t.reads is not None for t in traffic)
    assert max(map(len, prompts)) <= 200
    assert max(max(p) for p in prompts) < 100


def test_the_default_points_are_in_the_model_and_of_every_kind() -> None:
    assert default_points(30)[:4] == [
        "hook_embed", "blocks.0.hook_resid_post", "blocks.15.hook_resid_post", "blocks.29.hook_resid_post"
    ]  # fmt: skip
    assert default_points(1)[:2] == ["hook_embed", "blocks.0.hook_resid_post"]
    assert not any("attn" in name for name in default_points(30, tp_size=2))
    assert any("hook_rot_k" in name for name in default_points(30))


def test_the_ratio_is_the_median_of_rounds_and_not_of_their_sums() -> None:
    rounds = ([(2.0, 2.0), (1.0, 1.0), (5.0, 15.0)], [(1.0, 1.0), (1.0, 1.0), (9.0, 9.0)])
    assert Overhead(*rounds, tokens=1).ratio == 0.9


def test_a_machine_that_slows_down_within_a_round_changes_nothing() -> None:
    """Batches of 1 s, and of 1.25 s with a recording, on a machine that takes 10 % longer from batch to batch."""
    slower = [1.0, 1.1, 1.2, 1.3]
    recorded, plain = list[tuple[float, float]](), list[tuple[float, float]]()
    for n in range(6):
        outer, inner = (slower[0], slower[3]), (slower[1], slower[2])
        with_it, without = (outer, inner) if n % 2 else (inner, outer)
        recorded.append((1.25 * with_it[0], 1.25 * with_it[1]))
        plain.append(without)
    found = Overhead(recorded, plain, tokens=1)
    assert found.ratios == pytest.approx([0.8] * 6)
    assert found.interval is not None
    assert found.floor == pytest.approx((1 / 1.3, 1.1 / 1.2))
    said = "throughput 0.80 of that without recording (0.80 to 0.80, 97% interval of 6 rounds; "
    assert found.note == said + "two batches without recording differ by 0.77 to 0.92)"
    assert "3 rounds, too few for an interval" in Overhead(recorded[:3], plain[:3], tokens=1).note
