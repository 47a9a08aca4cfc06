"""Effects and floors on made-up experiments: what was put in is found, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.stats.distance import row_distance
from sglang_probe.studies.floor import (
    ALARM,
    EFFECT,
    FLOOR,
    MARGIN,
    NO_TEST,
    SAME_ORDER,
    cell_sums,
    comparisons,
    floor_table,
)

ARMS = {"a": "a", "b": "b", "b.repeat": "b", "a.repeat": "a"}
LAYER = "blocks.0.hook_resid_post"


def positions(clusters: int, rows: int) -> pd.DataFrame:
    cluster = np.repeat([f"f{i}" for i in range(clusters)], rows)
    return pd.DataFrame({"cluster": pd.Categorical(cluster), "phase": "prefill", "segment": "user"})


def study(distances: Any, clusters: int, rows: int, arms: dict[str, str] | None = None, **options: Any) -> pd.DataFrame:
    """`distances(comparison)` gives the relative L2 of every row."""
    where = positions(clusters, rows)
    sums = [
        cell_sums(where, {LAYER: distances(c)}, options.get("by", ())).assign(**c.columns)
        for c in comparisons(arms or ARMS, "a")
    ]
    return floor_table(pd.concat(sums), "a", **options)


def test_without_captured_rows_there_is_no_floor_and_no_error() -> None:
    sums = cell_sums(positions(6, 2), {}, ()).assign(kind=EFFECT, arm="b", comparison="b vs a")
    assert floor_table(sums, "a").empty


def test_effects_and_floors_are_across_the_same_two_orders() -> None:
    found = {(c.kind, c.arm, c.a, c.b) for c in comparisons(ARMS, "a")}
    assert found == {
        (SAME_ORDER, "b", "b", "a"),
        (SAME_ORDER, "b", "b.repeat", "a.repeat"),
        (EFFECT, "b", "b", "a.repeat"),
        (EFFECT, "b", "a", "b.repeat"),
        (FLOOR, "b", "b", "b.repeat"),
        (FLOOR, "a", "a", "a.repeat"),
    }
    assert {c.arm for c in comparisons({**ARMS, "c": "c"}, "b") if c.kind == SAME_ORDER} == {"a", "c"}


def test_exchanging_the_labels_of_an_order_turns_effects_into_floors() -> None:
    """What the test rests on, for any number of orders."""
    arms = {f"{arm}{r}": arm for r in range(3) for arm in "ab"}
    planned = comparisons(arms, "a")

    def exchanged(run: str, order: int) -> str:
        return run.translate({ord("a"): "b", ord("b"): "a"}) if run.endswith(str(order)) else run

    for order in range(3):
        for c in planned:
            if c.kind == SAME_ORDER:
                continue
            other = (exchanged(c.a, order), exchanged(c.b, order))
            (kind,) = {d.kind for d in planned if (d.a, d.b) == other}
            assert (kind != c.kind) == (order in c.orders)


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
    # Half of the effects have a run of `b` for reference, whose rows are longer by the shift.
    expected = np.sqrt(0.2**2 + 2 * 16 * 2e-5) * (1 + 1 / np.sqrt(1.04)) / 2
    assert r["effect_low"] < expected < r["effect_high"] < 0.201
    assert r["excess_low"] > 0.15
    assert (r["verdict"], r["clusters"]) == ("above the floor", 24)
    assert r["p"] < 1e-3


def simulated(order: float, noise: float, policy: float, *, replicates: int = 2, studies: int = 100) -> pd.DataFrame:
    """Tables of made-up experiments in 8 clusters of 10 positions: rows that all runs share, what the order adds to
    the runs of one order, noise of each run, and what the policy adds to the runs of one arm."""
    clusters, rows = 8, 10
    arms = {f"{arm}{r}": arm for r in range(replicates) for arm in "ab"}
    tables = []
    for seed in range(studies):
        rng = np.random.default_rng(seed)

        def rows_of(size: float, rng: np.random.Generator = rng) -> torch.Tensor:
            return torch.from_numpy(size * rng.normal(size=(clusters * rows, 16)))

        text, moved = rows_of(1.0), rows_of(policy)
        by_order = [rows_of(order) for _ in range(replicates)]
        runs = {run: text + by_order[int(run[1])] + rows_of(noise) + moved * (run[0] == "b") for run in arms}
        tables.append(study(distances_of(runs), clusters, rows, arms))
    return pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize(
    ("order", "noise", "replicates"),
    [(1e-3, 1e-3, 2), (1e-3, 0, 2), (1e-3, 2e-4, 3)],
    ids=["order and noise", "deterministic given its batches", "three orders"],
)
def test_a_policy_that_does_nothing_is_found_as_seldom_as_the_level_says(
    order: float, noise: float, replicates: int
) -> None:
    found = simulated(order, noise, policy=0, replicates=replicates)
    assert (found["p"] <= 0.05).mean() <= 0.12  # 5 %, and three standard errors of 100 studies
    assert not (found["verdict"] == "above the floor").any()
    wrong = found["verdict"].str.startswith(("above", "alarm")).mean()
    assert wrong <= 0.12
    assert found["excess"].abs().max() < 0.1 * found["floor"].mean()
    if not noise:
        assert set(found["verdict"]) == {"bit-identical in the same order"}
        assert (found["same_order"] == 0).all()


@pytest.mark.parametrize("policy", [0.5, 1.0, 1.3])
def test_a_policy_is_found_beside_an_order_that_moves_rows_more(policy: float) -> None:
    found = simulated(order=1e-3, noise=1e-4, policy=policy * 1e-3, studies=40)
    assert (found["p"] <= 0.05).mean() >= 0.95
    assert found["verdict"].str.startswith("above the floor").mean() >= 0.95
    assert found["same_order"].mean() < found["effect"].mean()


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
        (0.1, 0.2, 10, ALARM),
        (0.1, 0.1, 10, f"equivalent within {MARGIN:g}"),
        (0.2, 0.1, 3, f"above the floor; {NO_TEST}"),
        (0.1, 0.2, 3, f"not above the floor; {NO_TEST}"),
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
        return cell_sums(where, {LAYER: l2.to_numpy()}, ["start"]).assign(**c.columns)

    table = floor_table(pd.concat([sums(c) for c in comparisons(ARMS, "a")]), "a", by=["start"])
    assert len(table) == 40
    assert (table["q"] >= table["p"]).all()
    assert table.loc[table["verdict"].str.startswith("above"), "start"].tolist() == [7]


def test_with_one_replicate_there_is_a_distance_in_the_same_order_and_no_floor() -> None:
    (r,) = study(lambda c: np.full(24, 0.1), 6, 4, {"a": "a", "b": "b"}).to_dict("records")
    assert r["verdict"] == "no floor: run replicates"
    assert r["effect"] == r["same_order"] == pytest.approx(0.1)
    assert np.isnan([r["floor"], r["p"]]).all()


def test_every_arm_has_the_baselines_floor_over_its_own_positions() -> None:
    """An arm that computed fewer positions is compared over these, on both sides."""
    arms = {"a": "a", "b": "b", "c": "c", "c.repeat": "c", "b.repeat": "b", "a.repeat": "a"}
    where = positions(6, 4)
    parts = []
    for c in comparisons(arms, "a"):
        mine = where.iloc[::2] if c.beside == "b" else where
        l2 = np.where(np.arange(24) % 2, 0.3, 0.1)[:: 2 if c.beside == "b" else 1]
        parts.append(cell_sums(mine, {LAYER: l2}, ()).assign(**c.columns))
    table = floor_table(pd.concat(parts), "a").set_index("arm")
    assert table.loc["b", ["positions", "floor"]].tolist() == pytest.approx([12, 0.1])
    assert table.loc["c", ["positions", "floor"]].tolist() == pytest.approx([24, 0.2])
