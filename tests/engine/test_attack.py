"""Proof by attack: random traffic on a real engine, the invariants, and the true owner of every KV slot.

Each safeguard has a negative control: with it disabled, something must notice. Seeds are printed by the driver and can
be replayed: `python -m tests.attack.driver --seed N --out DIR` (`PYTHONPATH` as below for the slot oracle).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack.outcome import Outcome, attack

pytestmark = pytest.mark.engine


def assert_exact(outcome: Outcome) -> None:
    assert outcome.violations == {}, outcome.output
    assert outcome.oracle["compared"] > 20_000
    assert (outcome.oracle["wrong"], outcome.oracle["unknown"]) == (0, 0), (outcome.oracle["first"], outcome.output)


@pytest.mark.parametrize("seed", [2, 3])
def test_random_traffic_keeps_every_invariant_and_every_owner(seed: int, tmp_path: Path) -> None:
    outcome = attack(tmp_path, seed, 100)
    assert_exact(outcome)
    assert outcome.counts["reused"] > 1000
    assert outcome.counts["rebinds"] > 0
    # Seed 2: mixed chunks, LFU, 1,024 tokens of KV. Seed 3: retraction.
    assert outcome.counts["mixed" if seed == 2 else "retracted"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 22))
def test_long_attack(seed: int, tmp_path: Path) -> None:
    assert_exact(attack(tmp_path, seed, 400))


@pytest.mark.parametrize(
    ("sabotage", "seed", "server"),
    [
        ("ignore rebinds", 2, {}),
        pytest.param("ignore publications", 2, {}, marks=pytest.mark.slow),
        pytest.param("token keys in pages", 2, {"page_size": 16, "max_total_tokens": 4096}, marks=pytest.mark.slow),
        pytest.param("keep the first owner", 2, {"max_total_tokens": 1024}, marks=pytest.mark.slow),
        pytest.param("no attempts", 3, {}, marks=pytest.mark.slow),
        pytest.param("shift the rows", 2, {}, marks=pytest.mark.slow),
    ],
)
def test_without_a_safeguard_the_attack_is_noticed(sabotage: str, seed: int, server: dict, tmp_path: Path) -> None:
    outcome = attack(tmp_path, seed, 80, sabotage=sabotage, **server)
    noticed = outcome.oracle["wrong"] + outcome.oracle["unknown"] > 0 or outcome.violations
    assert noticed, outcome.output
