"""Matching of dictionaries: planted permutations are found, strangers score what chance says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.sae.match import chance, compare, cosine_by_index, match
from sglang_probe.sae.sae import SAE
from tests.sae.planted import Planted
from tests.sae.small import random_sae


def test_a_shuffled_dictionary_with_signs_turned_is_matched_one_to_one() -> None:
    d = Planted.make().directions
    order = np.random.default_rng(0).permutation(len(d))
    found = match(d, -3 * d[order])
    assert found.mcc == pytest.approx(1)
    assert (order[found.second] == found.first).all()


def test_the_matching_is_the_best_of_all_and_not_the_greedy_one() -> None:
    a = np.array([[1.0, 0.0], [0.8, 0.6]])
    b = np.array([[0.9, 0.1], [0.0, 1.0]])
    found = match(a, b)  # greedy pairs a[0] with b[0], and so does the best
    best = max(
        sum(abs(a[i] @ b[j]) / np.linalg.norm(a[i]) / np.linalg.norm(b[j]) for i, j in zip((0, 1), p, strict=True))
        for p in ((0, 1), (1, 0))
    )
    assert found.cosine.sum() == pytest.approx(best)


def test_a_rotated_dictionary_scores_chance() -> None:
    d = Planted.make(features=60, width=32).directions
    q, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(32, 32)))
    null = chance(d, d, rotations=8)
    assert match(d, d @ q).mcc == pytest.approx(null.mean(), abs=4 * null.std() + 0.01)
    assert null.max() < 0.6


def test_more_latents_match_better_by_chance_alone() -> None:
    """Why the value under chance is computed every time."""
    few, many = (Planted.make(features=n, width=32).directions for n in (20, 200))
    assert chance(many, many, rotations=2).mean() > chance(few, few, rotations=2).mean() + 0.05


def test_two_saes_that_share_half_of_their_latents() -> None:
    a, other = random_sae("standard", 32, 40, seed=1), random_sae("standard", 32, 40, seed=2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    half = SAE(
        "standard",
        torch.cat([a.W_enc[:, :20], other.W_enc[:, :20]], 1)[:, order],
        torch.cat([a.W_dec[:20], other.W_dec[:20]])[order],
        a.b_enc,
        a.b_dec,
    )
    every = np.ones(40, dtype=bool)
    found = compare(a, half, every, every)
    assert found["above_0.7"] == 0.5
    assert 0.5 <= found["shared"] < 0.8
    assert found["mcc"] > found["mcc_chance_most"] + 0.1


def test_dead_latents_take_no_part() -> None:
    a = random_sae("standard", 32, 40, seed=1)
    alive = np.arange(40) < 30
    found = compare(a, a, alive, np.flatnonzero(alive))
    assert (found["alive_first"], found["alive_second"], found["mcc"]) == (30, 30, pytest.approx(1))


def test_latents_of_dictionaries_that_began_alike_are_compared_by_index() -> None:
    a = random_sae("standard", 32, 10)
    turned = a.W_dec.clone()
    turned[3] = -turned[3]
    b = SAE("standard", a.W_enc, turned, a.b_enc, a.b_dec)
    found = cosine_by_index(a, b, np.array([3, 4]))
    assert found["decoder"].tolist() == pytest.approx([-1, 1])
    assert found["encoder"].tolist() == pytest.approx([1, 1])


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be matched"):
        match(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ConfigError, match="row 1"):
        match(np.array([[1.0, 0], [0, 0]]), np.ones((2, 2)))
