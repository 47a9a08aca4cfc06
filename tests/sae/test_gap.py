"""The decomposition recovers a planted drift and a planted composition, each without the other."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.sae.gap import gap, quartiles

VARIANCE = 10.0


def arm(
    texts: int = 30, each: int = 80, *, seed: int, drift: float = 0.0, hotter: float = 0.0, text_seed: int = 0
) -> pd.DataFrame:
    """Rows whose error falls with entropy, has an effect of the text, and grows by `drift * VARIANCE`."""
    rng, own = np.random.default_rng(seed), np.random.default_rng(text_seed).normal(size=texts)
    text = np.repeat(np.arange(texts), each)
    entropy = rng.uniform(0, 4, len(text))
    entropy = np.where(rng.random(len(text)) < hotter, rng.uniform(3, 4, len(text)), entropy)
    error = VARIANCE * (0.3 - 0.04 * np.floor(entropy) + drift) + 0.1 * own[text] + rng.normal(0, 0.3, len(text))
    return pd.DataFrame({"text": text, "error": error, "entropy": entropy})


CUTS = (1.0, 2.0, 3.0)


def test_numbers_worked_out_by_hand() -> None:
    first = pd.DataFrame({"text": range(6), "error": [4.0, 2] * 3, "entropy": [0.0, 5] * 3})
    second = pd.DataFrame({"text": range(6), "error": [6.0, 2, 2, 2, 2, 2], "entropy": [0.0, 5, 5, 5, 5, 5]})
    found = gap(first, second, variance=2.0, cuts=(1.0,))
    # Bands: FVU 2 and 1 at half the rows each, then 3 and 1 at a sixth and five sixths.
    assert float(found.total.estimate) == pytest.approx(8 / 6 - 1.5)
    assert float(found.within.estimate) == pytest.approx(0.5 * (3 - 2))
    assert float(found.composition.estimate) == pytest.approx((1 / 6 - 1 / 2) * 3 + (5 / 6 - 1 / 2) * 1)
    assert found.bands["share_second"].tolist() == pytest.approx([1 / 6, 5 / 6])


def test_a_drift_within_bands_is_not_taken_for_composition() -> None:
    found = gap(arm(seed=1), arm(seed=2, drift=0.03), variance=VARIANCE, cuts=CUTS)
    assert found.within.low < 0.03 < found.within.high
    assert found.within.low > 0.02
    assert found.composition.low < 0 < found.composition.high


def test_another_mixture_of_entropies_hides_a_drift_of_the_same_size() -> None:
    """A model at temperature 1 writes text of higher entropy, which is easier to reconstruct: the raw gap says that
    all is well."""
    found = gap(arm(seed=1), arm(seed=2, drift=0.02, hotter=1 / 3), variance=VARIANCE, cuts=CUTS)
    assert float(found.total.estimate) == pytest.approx(0.0, abs=0.004)
    assert found.within.low < 0.02 < found.within.high
    assert found.composition.high < -0.01


def test_without_any_difference_the_interval_leaves_out_zero_one_time_in_twenty() -> None:
    missed = 0
    for i in range(200):
        found = gap(arm(20, 20, seed=2 * i), arm(20, 20, seed=2 * i + 1), variance=VARIANCE, cuts=CUTS)
        missed += not found.within.low <= 0 <= found.within.high
    assert missed <= 20  # 5 % of 200, and three standard deviations


def test_bands_are_quartiles_of_the_first_arm() -> None:
    first = arm(seed=1)
    found = gap(first, arm(seed=2, hotter=0.5), variance=VARIANCE)
    assert found.bands["share_first"].tolist() == pytest.approx([0.25] * 4, abs=0.001)
    assert found.bands["share_second"].iloc[-1] > 0.5
    assert quartiles(np.arange(101)) == (25, 50, 75)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match="different texts"):
        gap(arm(seed=1), arm(texts=29, seed=2), variance=1.0)
    with pytest.raises(ConfigError, match="entropy band 2"):
        gap(arm(seed=1), arm(seed=2), variance=1.0, cuts=(9.0,))
    with pytest.raises(ConfigError, match="empty"):
        quartiles(np.zeros(10))
