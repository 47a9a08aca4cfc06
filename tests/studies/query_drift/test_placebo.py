"""Borders where nothing happens: what is measured there, and whether a planted excess is told from it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from sglang_probe.attention.rope import Rotary
from sglang_probe.attention.weights import AttentionSpec
from sglang_probe.eviction.layer import Layer, Queries
from sglang_probe.stats.placebo import placebo_p, within_sd
from sglang_probe.studies.query_drift import summary
from sglang_probe.studies.query_drift.captured import Captured, WindowCoverage
from sglang_probe.studies.query_drift.excess import excess_drift
from sglang_probe.studies.query_drift.horizon import first_failure
from sglang_probe.studies.query_drift.options import DriftOptions
from sglang_probe.studies.query_drift.placebo import TEXT, TURN, at_border, placebo_borders, placebo_excess
from sglang_probe.studies.query_drift.summary import ALL, summarise
from sglang_probe.studies.query_drift.tables import Tables, _excess, measure

HEADS, KV_HEADS, DIM, LENGTH, STEPS = 2, 1, 8, 120, 16
OPTIONS = DriftOptions(window=16, sinks=2, edges=(1, 4, 8, 16), placebos=5, permutations=19)


def walk(steps: int, seed: int, forget: float = 0.9) -> Tensor:
    """Queries that forget slowly, `[steps, HEADS, DIM]`."""
    fresh = torch.randn(steps, HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    x = [fresh[0]]
    for i in range(1, steps):
        x.append(forget * x[-1] + math.sqrt(1 - forget**2) * fresh[i])
    return torch.stack(x)


def request(seed: int, *, turn: bool = False, turns: tuple[tuple[int, int], ...] = ()) -> Captured:
    """A request whose queries walk on through the border; with `turn` they point elsewhere from the first step on."""
    q = walk(LENGTH + STEPS, seed)
    if turn:
        q[LENGTH:] = q[LENGTH:].roll(1, dims=-1)
    k = torch.randn(LENGTH + STEPS, KV_HEADS, DIM, generator=torch.Generator().manual_seed(seed + 1))
    rotary = Rotary(head_dim=DIM)
    post = rotary.rotate(q, torch.arange(LENGTH + STEPS))
    layer = Layer(
        q_NHD=post[:LENGTH],
        k_LGD=k[:LENGTH],
        spec=AttentionSpec(scaling=DIM**-0.5),
        rotary=rotary,
        future=Queries(post[LENGTH:], k[LENGTH:]),
    )
    return Captured(layer, q[:LENGTH], q[LENGTH:], torch.zeros(HEADS, DIM), OPTIONS.window, turns)


def test_borders_leave_a_prompt_before_them_and_all_steps_after_them() -> None:
    borders = placebo_borders(request(0), OPTIONS, seed=1)
    assert len(borders) == 5
    assert {(b.steps, b.where) for b in borders} == {(STEPS, TEXT)}
    assert all(OPTIONS.shortest_prompt <= b.at <= LENGTH - STEPS for b in borders)
    assert len({b.at for b in borders}) == 5
    assert borders == placebo_borders(request(9), OPTIONS, seed=1)
    assert borders != placebo_borders(request(0), OPTIONS, seed=2)
    tight = DriftOptions(window=54, sinks=2)
    assert [b.steps for b in placebo_borders(request(0), tight, seed=0)] == [9]
    assert placebo_borders(request(0), DriftOptions(window=56, sinks=2), seed=0) == []


def test_in_a_chat_borders_are_where_earlier_answers_begin() -> None:
    found = placebo_borders(request(0, turns=((10, 30), (50, 60), (70, 74), (90, 118))), OPTIONS, seed=0)
    assert [(b.at, b.steps, b.where) for b in found] == [(50, 10, TURN), (90, STEPS, TURN)]


def test_a_placebo_border_is_measured_as_the_end_of_the_prompt_is() -> None:
    c = request(3)
    borders = placebo_borders(c, OPTIONS, seed=0)
    found = placebo_excess(c, borders, OPTIONS)
    edges = torch.tensor(OPTIONS.edges)
    for i, b in enumerate(borders):
        cut = at_border(c, b)
        assert (cut.length, cut.steps) == (b.at, STEPS)
        whole = excess_drift(
            cut.prompt_pre_LHD,
            torch.arange(b.at),
            cut.decode_pre_THD,
            cut.decode_at,
            window=OPTIONS.window,
            edges=edges,
        )
        mine = found[(found["border"] == i) & (found["kind"] == "raw")]
        assert mine["distance"].tolist() == [1, 4, 8]
        assert mine["prompt"].to_numpy() == pytest.approx(whole.prompt_HX.mean(0).numpy(), abs=1e-5)
        assert mine["decode"].to_numpy() == pytest.approx(whole.decode_HX.mean(0).numpy(), abs=1e-5)
        assert mine["pairs"].tolist() == whole.decode_pairs_X.tolist()
    # What the cut request attends to is the prefix, then its own steps.
    first = at_border(c, borders[0])
    longer = replace(c.layer, future=None)
    rows = longer.prompt_attention(LENGTH)[..., borders[0].at : borders[0].at + STEPS, : borders[0].at + STEPS]
    torch.testing.assert_close(first.layer.future_attention, rows)


def excess_of(seed: int, *, turn: bool, documents: int = 7) -> pd.DataFrame:
    """What a study of one layer says of excess drift, by distance."""
    tables = Tables()
    for i in range(documents):
        c = request(10_000 * seed + 10 * i, turn=turn)
        tables.add("excess", f"r{i}", 0, _excess(c, OPTIONS))
        tables.add("placebo", f"r{i}", 0, placebo_excess(c, placebo_borders(c, OPTIONS, seed=100 * seed + i), OPTIONS))
    found = {name: frame.assign(cluster=frame["rid"]) for name, frame in tables.frames().items()}
    said = summary._excess(found["excess"], found["placebo"])
    return said[(said["layer"] == ALL) & (said["kind"] == "raw")].set_index("distance")


def test_without_a_change_at_the_border_the_excess_is_found_as_seldom_as_the_level_says() -> None:
    studies = [excess_of(seed, turn=False) for seed in range(1, 31)]
    p = np.array([s["p"].to_numpy() for s in studies])
    assert (p <= 0.05).mean(0).max() <= 0.17  # 5 %, and 3 standard errors of 30 studies
    beyond = np.array([s["beyond"].to_numpy() for s in studies])
    assert (np.abs(beyond.mean(0)) < 4 * beyond.std(0) / math.sqrt(30)).all()
    covered = np.mean([(s["beyond_low"] <= 0) & (s["beyond_high"] >= 0) for s in studies], axis=0)
    assert covered.min() >= 0.85
    # What a single border does by itself is far from nothing, which an interval over documents does not say.
    assert all((s["placebo_sd"] > 0.03).all() for s in studies)


def test_a_planted_change_at_the_border_is_found_with_its_size() -> None:
    for seed in range(1, 6):
        turned, plain = excess_of(seed, turn=True), excess_of(seed, turn=False)
        assert (turned["p"] <= 0.01).all()
        assert (turned["q"] <= 0.01).all()
        assert (turned["beyond_low"].loc[[1, 4]] > 0.1).all()
        pd.testing.assert_series_equal(turned["placebo"], plain["placebo"])
        assert (turned["borders"] == 7 * 5).all()


def test_horizons_and_changes_have_a_placebo_too() -> None:
    tables = Tables()
    cover = WindowCoverage(OPTIONS.window, 0, 0, np.ones(OPTIONS.window, dtype=bool))
    for layer in (0, 1):
        for i in range(6):
            c, other = (request(10 * i + 100 * n) for n in (0, 1))
            measure(tables, f"r{i}", layer, c, other, cover, OPTIONS)
    frames = tables.frames()
    placebo = frames["placebo"].groupby(["rid", "layer"])["at"].agg(lambda x: sorted(set(x)))
    assert (placebo.xs(0, level="layer") == placebo.xs(1, level="layer")).all()  # one set of borders a request
    found = summarise(frames, {f"r{i}": f"r{i}" for i in range(6)}, OPTIONS)
    horizon = found.horizon.set_index(["layer", "baseline"])
    assert (horizon["upto"] == STEPS).all()
    assert horizon["upto_mean"].between(0, STEPS).all()
    assert horizon["placebo_mean"].between(0, STEPS).all()
    assert horizon["p"].between(0, 1).all()
    by_hand = [
        first_failure((g["window"] - g["recency"]).to_numpy(), run=OPTIONS.run)[0]
        for _, g in frames["placebo_recall"][frames["placebo_recall"]["layer"] == 0].groupby(["rid", "border"])
    ]
    assert horizon.loc[("0", "recency"), "placebo_mean"] == pytest.approx(np.mean(by_hand))
    assert found.changes["text"].between(0, 1).all()
    assert (found.changes["beyond"] == found.changes["found"] - found.changes["text"]).all()


def test_a_draw_of_borders_by_hand() -> None:
    # Six families whose true border is 1 above both placebos: only the observed draw and none other is as far, and of
    # the 3 ** 6 draws two in a hundred are as extreme from below; none reaches 6 * 2 / 3.
    values = np.tile([1.0, 0.0, 0.0], (6, 1))
    assert placebo_p(values) == pytest.approx(3**-6, abs=2e-3)
    assert placebo_p(np.tile([0.0, 1.0, -1.0], (6, 1))) == 1.0
    assert np.isnan(placebo_p(values[:5]))
    some = values.copy()
    some[0, 0] = np.nan
    assert np.isnan(placebo_p(some))
    some[0] = [1.0, np.nan, 0.0]
    assert placebo_p(some) < 0.02
    assert within_sd(np.array([[1.0, 3.0], [5.0, 7.0], [2.0, np.nan]])) == pytest.approx(math.sqrt(2))
    assert np.isnan(within_sd(np.array([[1.0, np.nan]])))


def test_prompts_too_short_for_another_border_have_no_placebo_and_say_so() -> None:
    tables = Tables()
    short = OPTIONS.model_copy(update={"window": 56})
    cover = WindowCoverage(56, 0, 0, np.ones(56, dtype=bool))
    for i in range(6):
        c, other = (replace(request(10 * i + 100 * n), window=56) for n in (0, 1))
        measure(tables, f"r{i}", 0, c, other, cover, short)
    found = summarise(tables.frames(), {f"r{i}": f"r{i}" for i in range(6)}, short)
    assert len(found.excess)
    assert found.excess["excess"].notna().all()
    assert (found.excess["borders"] == 0).all()
    for frame, columns in ((found.excess, ["placebo", "placebo_sd", "p", "q"]), (found.horizon, ["placebo_mean", "p"])):
        assert frame[columns].isna().all().all()
    assert found.changes["found"].notna().all()
    assert found.changes["text"].isna().all()
