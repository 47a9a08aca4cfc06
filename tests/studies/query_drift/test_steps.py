"""Drift by step, kept sets and controls on a layer whose decode queries are made to leave the window, or not."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import Tensor

from sglang_probe.attention.rope import Rotary
from sglang_probe.attention.weights import AttentionSpec
from sglang_probe.eviction.layer import Layer, Queries
from sglang_probe.studies.query_drift.captured import Captured, mean_of_others
from sglang_probe.studies.query_drift.cosine import prompt_mean, window_cosine, window_rotation_null
from sglang_probe.studies.query_drift.options import DriftOptions
from sglang_probe.studies.query_drift.steps import METRICS, importance_cosines, step_bins, step_drift
from sglang_probe.studies.query_drift.window_choice import control_rows, recall_by_step

LENGTH, STEPS, WINDOW, HEADS, KV, DIM = 160, 30, 16, 4, 2, 16
ROTARY = Rotary(head_dim=DIM, base=1e4)
OPTIONS = DriftOptions(window=WINDOW, budget=0.25)


def request(seed: int, *, turned: bool = False) -> Captured:
    """Queries around one direction per head; the keys of some positions answer to it, far behind the window.

    With `turned` decoding asks in another direction, to which other positions answer.
    """
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    # Directions in the slowest pairs, which RoPE hardly turns here.
    slow = torch.zeros(DIM)
    slow[[DIM // 2 - 1, DIM - 1]] = 6.0
    other = torch.zeros(DIM)
    other[[DIM // 2 - 2, DIM - 2]] = 6.0
    prompt = 0.3 * draw(LENGTH, HEADS, DIM) + slow
    decode = 0.3 * draw(STEPS, HEADS, DIM) + (other if turned else slow)
    keys = 0.3 * draw(LENGTH + STEPS, KV, DIM)
    keys[20:40] += slow
    keys[60:80] += other
    at = torch.arange(LENGTH + STEPS)
    k = ROTARY.rotate(keys, at)
    layer = Layer(
        q_NHD=ROTARY.rotate(prompt, at[:LENGTH]),
        k_LGD=k[:LENGTH],
        spec=AttentionSpec(scaling=DIM**-0.5),
        rotary=ROTARY,
        q_pre_NHD=prompt,
        future=Queries(ROTARY.rotate(decode, at[LENGTH:]), k[LENGTH:]),
    )
    return Captured(layer, prompt, decode, torch.zeros(HEADS, DIM), WINDOW)


def test_bins_of_steps_double_and_leave_none_out() -> None:
    assert step_bins(15) == [(0, 1), (1, 3), (3, 7), (7, 15)]
    assert step_bins(10) == [(0, 1), (1, 3), (3, 7), (7, 10)]


def test_rows_are_means_over_the_steps_of_a_bin() -> None:
    c = request(0)
    frame = step_drift(c, sinks=4)
    assert set(METRICS) <= set(frame.columns)
    assert frame["steps"].sum() == HEADS * STEPS
    by_hand = window_cosine(c.decode_pre_THD, c.window_pre_NHD)[7:15, 2].mean()
    row = frame[(frame["head"] == 2) & (frame["step"] == 8)].iloc[0]
    assert row["pre"] == pytest.approx(float(by_hand), abs=1e-6)
    assert row["steps"] == 8


def test_the_rotation_null_of_a_window_is_what_rotation_does_to_a_window_of_copies() -> None:
    q = torch.randn(3, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    decode_at, window_at = torch.tensor([100, 101, 140]), torch.arange(60, 76)
    null = window_rotation_null(q, ROTARY, decode_at=decode_at, window_at=window_at)
    copies = ROTARY.rotate(q[1].expand(16, HEADS, DIM), window_at)
    expected = window_cosine(ROTARY.rotate(q[1:2], decode_at[1:2]), copies)
    torch.testing.assert_close(null[1], expected[0])
    # Queries that are copies of each other lose that much behind RoPE, and nothing before it.
    same = torch.ones(WINDOW, HEADS, DIM)
    assert torch.allclose(window_cosine(same[:1], same), torch.ones(HEADS))


def test_decoding_that_asks_what_the_window_asked_finds_it_kept_and_a_turned_one_does_not() -> None:
    same, turned = (recall_by_step(request(3, turned=t), OPTIONS) for t in (False, True))
    assert same.window.mean() > 0.9
    assert turned.window.mean() < 0.3
    assert 0.05 < same.random.mean() < 0.3
    assert same.recency.mean() < 0.3


def test_each_control_shows_in_the_numbers_that_it_breaks() -> None:
    orders = [control_rows(request(4), request(5, turned=True), OPTIONS, seed=s) for s in range(12)]
    frame = pd.concat(orders).groupby("control").mean()
    real = frame.loc["as recorded"]
    strangers = frame.loc["another request's queries"]
    shuffled = frame.loc["shuffled keys"]
    assert real["pre_centred"] > 0.95
    assert strangers["pre_centred"] < 0.3
    assert shuffled[["pre_centred", "pre_centred_nearest"]].isna().all()
    assert real["mass"] > 0.9
    assert abs(shuffled["mass"] - shuffled["mass_chance"]) < 0.1
    assert shuffled["js"] > 2 * real["js"]


def test_a_window_of_other_queries_keeps_something_else() -> None:
    c = request(6)
    changed = c.prompt_pre_LHD.clone()
    changed[4 : 4 + WINDOW] = changed[4 : 4 + WINDOW].roll(-1, dims=-1)  # the first positions ask for `other`
    frame = control_rows(replace(c, prompt_pre_LHD=changed), request(7), OPTIONS, seed=0).set_index("control")
    assert frame.loc["window from the start", "mass"] < 0.3 < frame.loc["as recorded", "mass"]
    assert frame.loc["window from the start", "pre_centred"] < 0.3


def test_centring_by_other_requests_does_not_pull_a_prompt_apart() -> None:
    """Isotropic queries: pairs within a prompt of few queries look negatively related if its own mean is taken out."""
    requests = [request(s) for s in range(20)]
    noise = [torch.randn(12, HEADS, DIM, generator=torch.Generator().manual_seed(s)) for s in range(20)]
    own = [replace(c, prompt_pre_LHD=x, mean_HD=prompt_mean(x, sinks=0)) for c, x in zip(requests, noise, strict=True)]

    def pairs(c: Captured) -> Tensor:
        q = torch.nn.functional.normalize(c.centred(c.prompt_pre_LHD), dim=-1)
        return torch.einsum("nhd,mhd->nmh", q, q)[0, 1:].mean()

    biased = torch.stack([pairs(c) for c in own]).mean()
    others = mean_of_others({str(i): c.mean_HD for i, c in enumerate(own)})
    fair = torch.stack([pairs(replace(c, mean_HD=others[str(i)])) for i, c in enumerate(own)]).mean()
    assert biased < -0.05
    assert abs(fair) < 0.04
    mean = torch.stack([c.mean_HD for c in own[1:]]).mean(0)
    torch.testing.assert_close(others["0"], mean)


def test_importance_of_a_window_that_asks_alike_is_that_of_the_response() -> None:
    same, turned = (importance_cosines(request(8, turned=t), (16, 1), 4).set_index("window") for t in (False, True))
    assert same.loc[16, "without_sinks"] > 0.95
    assert turned.loc[16, "without_sinks"] < 0.5
