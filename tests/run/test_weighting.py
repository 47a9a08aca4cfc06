"""Rows are drawn as often as their weights say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.run import Run
from sglang_probe.run.weighting import Copies, Weights
from sglang_probe.studies.coverage.study import Study
from sglang_probe.studies.coverage.weights import write_weights
from tests.made_run import EMBEDDING


def drawn(run: Run, weight: str | Path | pd.DataFrame, seed: int = 0) -> Counter[int]:
    """How often each token's row comes out of an epoch."""
    rows = {tuple(EMBEDDING[i].tolist()): i for i in range(len(EMBEDDING))}
    batches = run.iter_batches("hook_embed", batch_size=4, weight=weight, seed=seed)
    return Counter(rows[tuple(r.tolist())] for b in batches for r in b)


def test_whole_weights_repeat_rows_and_what_is_not_named_is_left_out(make_run: Callable[..., Run]) -> None:
    weights = pd.DataFrame({"rid": ["b", "a", "b"], "start": [5, 0, 4], "end": [6, 2, 5], "weight": [1.0, 3.0, 0.0]})
    assert drawn(make_run(), weights) == {3: 3, 4: 3, 10: 1}


def test_the_weights_of_a_coverage_study_make_rows_look_like_the_traffic(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run()
    study = Study(run, ["segment"], by="position")
    found = study.measure()
    files = write_weights(study, found.maps, tmp_path)
    for name in ("segment", "segment x position"):
        assert pd.read_parquet(files[name]).columns.tolist() == ["rid", "start", "end", "weight"]
    # `a` computed tokens 3 to 6 as `system`, `b` reused them: each stands for two. All user tokens were run.
    assert drawn(run, files["segment"]) == {3: 2, 4: 2, 5: 2, 6: 2, 7: 1, 8: 1, 9: 1, 10: 1, 11: 1, 12: 1, 14: 1}
    assert drawn(run, str(files["segment"])) == drawn(run, files["segment"])
    tokens = run.tokens()
    tokens = tokens[(tokens["phase"] != "overshoot")]
    rows = tokens[tokens["row"] >= 0]
    weighted = pd.Series(Weights.read(files["segment"]).of(rows)).groupby(rows["segment"].to_numpy()).sum()
    assert weighted.to_dict() == tokens.groupby("segment").size().to_dict()


def test_fractions_are_rounded_at_random_and_right_on_average() -> None:
    weights = np.array([0.25, 1.5, 2.0, 0.0, 0.75])
    many = np.array([Copies(np.random.default_rng(seed)).of(weights) for seed in range(4000)])
    assert np.all(np.abs(many - weights) < 1)
    assert np.all(np.abs(many.sum(axis=1) - weights.sum()) < 1)
    assert np.allclose(many.mean(axis=0), weights, atol=0.03)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("trafic", "unknown weight `trafic`"),
        (pd.DataFrame({"rid": ["a"], "start": [0], "end": [1]}), "no column `weight`"),
        (pd.DataFrame({"rid": ["a"], "start": [0], "end": [1], "weight": [-1.0]}), "negative"),
        (pd.DataFrame({"rid": ["a"], "start": [0], "end": [1], "weight": [float("nan")]}), "negative or missing"),
    ],
)
def test_weights_that_are_none_are_refused(make_run: Callable[..., Run], weight: object, message: str) -> None:
    with pytest.raises(RunDirectoryError, match=message):
        list(make_run().iter_batches("hook_embed", batch_size=4, weight=weight))


def test_weights_of_another_run_name_nothing(make_run: Callable[..., Run]) -> None:
    weights = pd.DataFrame({"rid": ["zz"], "start": [0], "end": [9], "weight": [1.0]})
    assert drawn(make_run(), weights) == {}
