"""Effects and floors on made-up experiments: what was put in is found, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.stats.distance import row_distance
from sglang_probe.studies.floor import EFFECT, FLOOR, MARGIN, cell_sums, comparisons, floor_table

ARMS = {"a": "a", "b": "b", "b.repeat": "b", "a.repeat": "a"}
LAYER = "blocks.0.hook_resid_post"


def positions(clusters: int, rows: int) -> pd.DataFrame:
    cluster = np.repeat([f"f{i}" for i in range(clusters)], rows)
    return pd.DataFrame({"cluster": pd.Categorical(cluster), "phase": "prefill", "segment": "user"})


def study(distances: Any, clusters: int, rows: int, **options: Any) -> pd.DataFrame:
    """`distances(comparison)` gives the relative L2 of every row."""
    where = positions(clusters, rows)
    sums = [
        cell_sums(where, {LAYER: distances(c)}, options.get("by", ())).assign(
            kind=c.kind, arm=c.arm, comparison=c.label
        )
        for c in comparisons(ARMS, "a")
    ]
    return floor_table(pd.concat(sums), "a", **options)


def test_without_captured_rows_there_is_no_floor_and_no_error() -> None:
    sums = cell_sums(positions(6, 2), {}, ()).assign(kind=EFFECT, arm="b", comparison="b vs a")
    assert floor_table(sums, "a").empty


def test_effects_pair_replicates_and_floors_pair_runs_of_one_arm() -> None:
    found = {(c.kind, c.arm, c.a, c.b) for c in comparisons(ARMS, "a")}
    assert found == {
        (EFFECT, "b", "b", "a"),
        (EFFECT, "b", "b.repeat", "a.repeat"),
        (FLOOR, "b", "b.repeat", "b"),
        (FLOOR, "a", "a.repeat", "a"),
    }
    assert {c.arm for c in comparisons({**ARMS, "c": "c"}, "b") if c.kind == EFFECT} == {"a", "c"}


def experiment(rng: np.random.Generator, clusters: int, rows: int, shift: float) -> dict[str, torch.Tensor]:
    """Rows `[clusters * rows, 16]` of four runs: a common text, noise of each run, and in arm `b` a shift of known
    relative size, orthogonal to the text."""
    text = torch.from_numpy(rng.normal(size=(clusters * rows, 16)))
    text[:, 0] = 0
    text /= text.norm(dim=1, keepdim=True)
    runs = {}
    for run, arm in ARMS.items():
        noise = torch.from_numpy(rng.normal(size=text.shape)) * np.repeat(rng.gamma(4, 0.001, clusters), rows)[:, None]
        runs[run] = text + noise
        if arm == "b":
            runs[run][:, 0] += shift
    return runs


def distances_of(runs: dict[str, torch.Tensor]) -> Any:
    return lambda c: row_distance(runs[c.a], runs[c.b])[0]


def test_a_known_shift_is_recovered() -> None:
    rng = np.random.default_rng(0)
    (r,) = study(distances_of(experiment(rng, 24, 40, shift=0.2)), 24, 40).to_dict("records")
    # The noise of two runs adds in quadrature; a gamma(4, 0.001) has a mean square of 2e-5.
    expected = np.sqrt(0.2**2 + 2 * 16 * 2e-5)
    assert r["effect_low"] < expected < r["effect_high"] < 0.203
    assert r["excess_low"] > 0.15
    assert (r["verdict"], r["clusters"]) == ("above the floor", 24)
    assert r["p"] < 1e-3


def test_without_a_shift_few_experiments_find_one() -> None:
    by_p = by_interval = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        (r,) = study(distances_of(experiment(rng, 12, 6, shift=0.0)), 12, 6).to_dict("records")
        by_p += r["p"] <= 0.05
        by_interval += r["excess_low"] > 0  # one side of a 95 % interval: nominally 2.5 %
    # Binomial bounds of 99.9 % at 5 %; the percentile interval is known to be a little too narrow with 12 clusters.
    assert 0.005 <= by_p / 200 <= 0.105
    assert by_interval / 200 <= 0.09


def test_a_small_excess_is_called_small() -> None:
    rng = np.random.default_rng(3)
    noise = rng.gamma(4, 0.001, (20, 1))

    def distances(c: Any) -> Any:
        level = noise + rng.normal(0, 1e-5, (20, 30)) + (2e-4 if c.kind == EFFECT else 0)
        return level.ravel()

    (r,) = study(distances, 20, 30).to_dict("records")
    assert 1e-4 < r["excess_low"] < 2e-4 < r["excess_high"] < 3e-4
    assert r["verdict"] == f"above the floor, by less than {MARGIN:g}"


@pytest.mark.parametrize(
    ("effect", "floor", "clusters", "verdict"),
    [
        (0.0, 0.0, 10, "bit-identical"),
        (0.0, 0.1, 10, "bit-identical"),
        (0.1, 0.2, 10, "below the floor"),
        (0.2, 0.1, 3, "above the floor; no test"),
        (0.1, 0.2, 3, "not above the floor; no test"),
    ],
)
def test_verdicts(effect: float, floor: float, clusters: int, verdict: str) -> None:
    wobble = np.random.default_rng(0).uniform(0.9, 1.1, clusters * 4)
    table = study(lambda c: wobble * (effect if c.kind == EFFECT else floor), clusters, 4)
    (r,) = table.to_dict("records")
    assert r["verdict"] == verdict
    if effect == 0:
        assert r["identical_effect"] == 1.0
    if clusters < 6:
        assert np.isnan(r["p"])
        assert np.isnan(r["effect_low"])


def test_many_cells_are_corrected_for() -> None:
    rng = np.random.default_rng(5)
    where = positions(12, 40).assign(start=np.tile(np.arange(40), 12))

    def sums(c: Any) -> pd.DataFrame:
        l2 = rng.gamma(4, 0.001, len(where)) + (0.05 if c.kind == EFFECT else 0) * (where["start"] == 7)
        return cell_sums(where, {LAYER: l2.to_numpy()}, ["start"]).assign(kind=c.kind, arm=c.arm, comparison=c.label)

    table = floor_table(pd.concat([sums(c) for c in comparisons(ARMS, "a")]), "a", by=["start"])
    assert len(table) == 40
    assert (table["q"] >= table["p"]).all()
    assert table.loc[table["verdict"].str.startswith("above"), "start"].tolist() == [7]
