"""The lossless study on a real pair, and what it would say if rows were gathered from elsewhere."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sglang_probe.errors import ProbeError
from sglang_probe.run import tokens
from sglang_probe.run.run import Run
from sglang_probe.studies.ab.lossless import DECODED, GATHERED, HERE, LosslessResult, study_lossless

pytestmark = pytest.mark.engine
LAYER = "blocks.3.hook_resid_post"


def study(runs: dict[str, Run]) -> LosslessResult:
    return study_lossless({arm: [runs[arm], runs[f"{arm}.repeat"]] for arm in ("cache_on", "cache_off")})


def effect(result: LosslessResult, hook_point: str) -> pd.DataFrame:
    d = result.distance
    chosen = d[(d["runs"] == "cache_on, cache_off") & (d["hook_point"] == hook_point)]
    return chosen.set_index("positions")


def test_a_cached_run_covers_every_position_with_fewer_rows(runs: dict[str, Run]) -> None:
    result = study(runs)
    coverage = result.coverage.set_index("run")
    assert (coverage["covered"] == 1.0).all()
    assert coverage.loc["cache_on", "positions"] == coverage.loc["cache_off", "positions"]
    assert coverage.loc["cache_on", "rows"] < 0.7 * coverage.loc["cache_off", "rows"]
    assert set(effect(result, LAYER).index) == {HERE, GATHERED, DECODED}
    # Embeddings depend on the token alone; deeper rows differ by rounding.
    assert (effect(result, "hook_embed")["identical"] == 1.0).all()
    assert effect(result, LAYER)["l2_max"].max() < 0.05
    assert len(result.speedup) == 2
    # Floors are taken over the same positions.
    d = result.distance
    counts = d[d["hook_point"] == LAYER].set_index(["comparison", "runs", "positions"])["n"]
    floor = ("cache_off against itself", "cache_off.repeat, cache_off", GATHERED)
    assert counts[floor] == counts["cache_on against cache_off", "cache_on, cache_off.repeat", GATHERED]
    # ... and across two orders, as the effect beside them.
    orders = d.set_index("runs")["order"]
    assert set(orders["cache_off.repeat, cache_off"]) == set(orders["cache_on, cache_off.repeat"]) == {"another"}
    assert set(orders["cache_on, cache_off"]) == {"same"}


def test_rows_of_other_positions_would_be_seen(runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(frame: pd.DataFrame, spans: tokens.Computed) -> tuple[np.ndarray, np.ndarray]:
        rows, covered = sources(frame, spans)
        reused = (frame["status"] == "reused").to_numpy()
        rows[reused] = np.roll(rows[reused], 1)
        return rows, covered

    sources = tokens.sources
    monkeypatch.setattr(tokens, "sources", shifted)
    wrong = effect(study(runs), LAYER)
    assert wrong.loc[GATHERED, "l2_median"] > 0.1
    assert wrong.loc[HERE, "l2_max"] < 0.05


def test_arms_that_cannot_be_compared_are_refused(runs: dict[str, Run]) -> None:
    with pytest.raises(ProbeError, match="reuses positions"):
        study_lossless({"cache_off": [runs["cache_off"]]})
