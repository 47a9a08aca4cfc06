"""A probe finds what is planted, finds nothing in shuffled labels, and fires as often as it was told to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.steering import probe
from sglang_probe.steering.library import Library
from sglang_probe.steering.make import Target
from tests.steering.conftest import POINT, MakeRun
from tests.steering.test_make import rows


def test_the_fit_is_the_minimum_of_its_loss() -> None:
    """Against plain gradient descent on the same loss, to the fourth digit; rows of very different scales."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40, 3)) * [1, 100, 0.01]
    a[:, 0] += 1
    w = probe.fit(a, b, penalty=0.1)
    x = torch.from_numpy(np.concatenate([a, b]))
    z = (x - x.mean(0)) / x.std(0, correction=0)
    y = torch.cat([torch.ones(40), torch.zeros(40)]).double()
    v = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z @ v[:3] + v[3], y) + 0.05 * v[:3].square().sum()
        (grad,) = torch.autograd.grad(loss, v)
        v = (v - 0.5 * grad).detach().requires_grad_()
    np.testing.assert_allclose(w, (v[:3] / x.std(0, correction=0)).detach().numpy(), rtol=1e-4)


def test_a_planted_direction_is_found() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=32)
    truth /= np.linalg.norm(truth)
    for seed in range(10):
        a, b = rng.normal(size=(2, 200, 32))
        found = probe.make(rows(a + 4 * truth), rows(b), fpr=0.05, seed=seed)
        assert found.w @ truth / np.linalg.norm(found.w) > 0.85
        assert float(found.auc.low) > 0.9
        assert float(found.gate.tpr.low) > 0.8


def test_shuffled_labels_are_at_chance() -> None:
    """The interval of the AUC leaves out one half in no more than 8 % of 300 draws without any difference."""
    rng = np.random.default_rng(2)
    out = 0
    for seed in range(300):
        x = rng.normal(size=(80, 8))
        found = probe.make(rows(x[:40]), rows(x[40:]), fpr=0.1, seed=seed)
        out += not float(found.auc.low) <= 0.5 <= float(found.auc.high)
    assert out / 300 < 0.08


@pytest.mark.parametrize(("m", "fpr", "k"), [(19, 0.05, 1), (99, 0.05, 5), (40, 0.1, 4), (9, 0.5, 5)])
def test_the_threshold_lets_through_what_it_promises(m: int, fpr: float, k: int) -> None:
    """k - 1 of the held-out negatives are above it, and of new ones k / (m + 1) on average, whatever their scores."""
    rng = np.random.default_rng(3)
    realised = []
    inside = []
    for _ in range(2000):
        negative = rng.lognormal(size=m)
        gate = probe.choose_threshold(np.array([1.0]), negative, fpr=fpr)
        assert int((negative > gate.threshold).sum()) == k - 1
        realised.append(0.5 * (1 - _erf(np.log(gate.threshold) / 2**0.5)))
        inside.append(float(gate.fpr.low) <= realised[-1] <= float(gate.fpr.high))
    assert float(gate.fpr.estimate) == pytest.approx(k / (m + 1))
    assert k / (m + 1) <= fpr + 1e-9
    error = np.std(realised) / 2000**0.5
    assert abs(np.mean(realised) - k / (m + 1)) < 4 * error
    assert 0.93 < np.mean(inside) < 0.97


def _erf(x: float) -> float:
    from math import erf

    return erf(x)


def test_ties_and_rounding_open_nothing_more() -> None:
    tied = probe.choose_threshold(np.array([1.0]), np.ones(19), fpr=0.5)
    assert tied.threshold == 1.0
    third = np.full(19, 1 / 3)  # no float32: a threshold that is rounded down would let all of them through
    assert probe.choose_threshold(np.array([1.0]), third, fpr=0.05).threshold >= 1 / 3


def test_the_true_positive_rate_has_the_exact_interval() -> None:
    gate = probe.choose_threshold(np.array([2.0] * 8 + [0.0] * 2), np.ones(19), fpr=0.05)
    assert [round(float(x), 4) for x in (gate.tpr.estimate, gate.tpr.low, gate.tpr.high)] == [0.8, 0.4439, 0.9748]


def test_a_rate_that_cannot_be_promised_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs 19 held-out negative prompts"):
        probe.choose_threshold(np.ones(5), np.ones(18), fpr=0.05)
    with pytest.raises(ConfigError, match="lies between 0 and 1"):
        probe.choose_threshold(np.ones(5), np.ones(18), fpr=0.0)


def test_a_stored_probe_fires_as_its_card_says(rows_run: MakeRun, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    noise = {(s, i): torch.randn(5, generator=g) for s in "pn" for i in range(60)}

    def row(rid: str, position: int) -> torch.Tensor:
        last = noise[rid[0], int(rid[1:])] + (torch.tensor([2.0, 0, 0, 0, 0]) if rid[0] == "p" else 0)
        return last if position == 3 else torch.ones(5)

    runs = [rows_run(s, {f"{s}{i}": (4, 1) for i in range(60)}, row) for s in "pn"]
    probe.write(Target(tmp_path / "lib", "gate"), *runs, POINT, fpr=0.1)
    vector = Library.open(tmp_path / "lib")["gate"]
    card = vector.card
    assert card.kind == "probe"
    told = probe.make(*(rows(np.stack([row(f"{s}{i}", 3).double().numpy() for i in range(60)])) for s in "pn"), fpr=0.1)
    assert vector.scalar("threshold") == told.gate.threshold == card.evidence["threshold"]
    fires = {s: sum(float(row(f"{s}{i}", 3) @ vector.vector) > told.gate.threshold for i in range(60)) for s in "pn"}
    assert fires["p"] > 40
    assert fires["n"] < 20
    assert card.evidence["held_out_prompts"] == [30, 30]
    curve = card.evidence["roc"]
    assert curve["tpr"][-1] == 1.0
    assert all(a <= b for a, b in zip(curve["tpr"], curve["tpr"][1:], strict=False))
