"""Unexplained variance, active and dead latents, in all and by group, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.sae.evaluation import Sinks, evaluate, variance_of
from sglang_probe.sae.sae import SAE
from tests.sae.small import hand_made, random_sae, rows

X = torch.tensor([[3.0, 1.0], [2.0, -4.0]])
"""`hand_made` makes (5, 4.5) and (0, -3) of them: squared errors 16.25 and 5; variance 0.25 + 6.25."""


def test_the_numbers_are_those_worked_out_by_hand() -> None:
    found = evaluate(hand_made(), X, groups={"phase": ["prefill", "decode"]})
    assert found.rows["error"].tolist() == [16.25, 5.0]
    assert found.rows["squared_norm"].tolist() == [10.0, 20.0]
    assert found.rows["active"].tolist() == [2, 2]
    assert found.variance == 6.5
    assert found.fvu == 10.625 / 6.5
    assert found.explained_variance == 1 - 10.625 / 6.5
    assert found.relative_error == (1.625 + 0.25) / 2
    assert found.fired.tolist() == [2, 1, 1]
    assert found.activation_sum.tolist() == [3.0, 1.5, 3.0]
    assert found.dead_share == 0
    by = found.groups.set_index("group")
    assert by.loc["prefill", "fvu"] == 16.25 / 6.5
    assert by.loc["decode", "fvu"] == 5 / 6.5
    assert np.isnan(by.loc["prefill", "fvu_own"])  # one row has no variance
    assert by.loc["prefill", "dead"] == pytest.approx(1 / 3)


def test_the_denominator_is_that_of_the_reference_when_one_is_given() -> None:
    found = evaluate(hand_made(), X, reference_variance=4.0)
    assert found.fvu == 10.625 / 4
    assert found.explained_variance == 1 - 10.625 / 6.5


def test_batches_of_any_size_give_the_same_as_all_rows_at_once() -> None:
    sae, x = random_sae("jumprelu"), rows(2500)
    labels = {"group": np.arange(2500) % 3}
    whole = evaluate(sae, x, groups=labels)
    parts = evaluate(sae, x.split([1, 1700, 799]), groups=labels)
    np.testing.assert_allclose(parts.rows, whole.rows, rtol=1e-4)
    np.testing.assert_array_equal(parts.fired, whole.fired)
    np.testing.assert_allclose(
        parts.groups.iloc[:, 2:].astype(float), whole.groups.iloc[:, 2:].astype(float), rtol=1e-4
    )


def test_groups_add_up_to_the_whole() -> None:
    sae, x = random_sae("standard"), rows(300)
    found = evaluate(sae, x, groups={"a": np.arange(300) % 4})
    weighted = (found.groups["fvu"] * found.groups["rows"]).sum() / 300
    assert weighted == pytest.approx(found.fvu)
    group = x[np.arange(300) % 4 == 2]
    alone = evaluate(sae, group)
    row = found.groups.set_index("group").loc["2"]
    assert row["fvu_own"] == pytest.approx(alone.fvu)
    assert row["explained_variance"] == pytest.approx(alone.explained_variance)
    assert row["l0"] == alone.l0


def test_variance_survives_a_mean_that_dwarfs_it() -> None:
    x = rows(4000).double() + 1e5
    assert evaluate(random_sae("standard"), x).variance == pytest.approx(
        float(x.var(0, unbiased=False).sum()), rel=1e-6
    )
    assert variance_of(x.split(100)) == pytest.approx(float(x.var(0, unbiased=False).sum()), rel=1e-6)


def test_a_sink_makes_an_sae_that_learnt_one_vector_look_perfect() -> None:
    """Why sinks are left out: one row in 256 carries the variance (sae.md 2.2)."""
    x = rows(2560)
    x[::256] = torch.tensor([3000.0, 0, 0, 0, 0, 0])
    one = torch.zeros(6, 1)
    one[0] = 1
    # Fires for the sinks alone, and reconstructs them; everything else becomes zero.
    learnt_one = SAE("jumprelu", one, one.T, torch.zeros(1), torch.zeros(6), torch.tensor([1000.0]))
    assert evaluate(learnt_one, x).explained_variance > 0.99
    sinks, limit = Sinks(first_positions=0).of(np.arange(2560), x.norm(dim=1).numpy())
    assert sinks.sum() == 10
    assert 10 < limit < 3000
    assert evaluate(learnt_one, x[torch.from_numpy(~sinks)]).explained_variance < 0.01


def test_sinks_are_told_by_position_and_by_norm() -> None:
    norms = np.array([900.0, 1.0, 1.0, 1.2, 11.5, 700.0])
    sinks, limit = Sinks().of([0, 1, 2, 3, 4, 0], norms)
    assert sinks.tolist() == [True, False, False, False, True, True]
    assert limit == pytest.approx(10 * 1.1)  # the median of positions 1 to 4
    assert Sinks(0, None).of([0, 1], norms[:2])[0].tolist() == [False, False]


@pytest.mark.parametrize("n", [1, 3])
def test_labels_that_do_not_match_the_rows_are_refused(n: int) -> None:
    with pytest.raises(ConfigError, match="labels"):
        evaluate(hand_made(), X, groups={"phase": ["prefill"] * n})


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rows"):
        evaluate(hand_made(), X[:0])
    with pytest.raises(ConfigError, match="no variance"):
        evaluate(hand_made(), X[[0, 0]])


def test_the_names_that_the_package_offers_are_not_its_modules() -> None:
    import importlib

    import sglang_probe.sae as package

    for name in ("evaluation", "folder", "threshold"):
        importlib.import_module(f"sglang_probe.sae.{name}")
    assert [n for n in package.__all__ if not callable(getattr(package, n))] == []
