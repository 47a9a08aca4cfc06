"""Rows of twins, compared: what is past the threshold, where it is first, and what is not comparable."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sglang_probe.gate.rows import LEAST_POSITIONS, ROUNDOFF, SUMS, Floor, Held, Rows, distances

POINTS = ("blocks.10.hook_resid_post", "blocks.2.hook_resid_post", "hook_embed")
N, WIDTH = 20, 16


def made(noise: float, seed: int, *, wrong: float = 0.0, after: int = 0, points: tuple[str, ...] = POINTS) -> Rows:
    """The same rows each time, with rounding; `wrong` from layer `after` on."""
    true, rng = np.random.default_rng(0), np.random.default_rng(seed)
    out = {}
    for name in sorted(points, key=POINTS.index):
        rows = true.standard_normal((N, WIDTH))
        layer = -1 if name == "hook_embed" else int(name.split(".")[1])
        size = noise + (wrong if layer >= after else 0.0)
        out[name] = Held(np.arange(30, 30 + N), (rows + size * rng.standard_normal((N, WIDTH))).astype(np.float32))
    return out


def floor(noise: float, pairs: int = 20) -> Floor:
    one = Floor("float32")
    for i in range(pairs):
        one.add([made(noise, 2 * i), made(noise, 2 * i + 1)])
    return one


def test_what_is_as_far_apart_as_computed_twins_is_right() -> None:
    one = floor(1e-4)
    found = [one.moved(made(1e-4, 100 + i), [made(1e-4, 200 + i), made(1e-4, 300 + i)]) for i in range(200)]
    assert [m for m in found if m is None or m.past] == []


@pytest.mark.parametrize(("after", "first"), [(0, "blocks.2.hook_resid_post"), (3, "blocks.10.hook_resid_post")])
def test_the_first_hook_point_in_the_model_that_is_wrong_is_named_with_the_positions(after: int, first: str) -> None:
    moved = floor(1e-4).moved(made(1e-4, 7, wrong=0.1, after=after), [made(1e-4, 8), made(1e-4, 9)])
    assert moved is not None
    assert (moved.hook_point, moved.past, moved.positions) == (first, True, tuple(range(30, 30 + N)))


def test_a_server_that_computes_the_same_bits_each_time_may_round_differently_at_a_border() -> None:
    one = floor(0.0)
    colds = [made(0.0, 1), made(0.0, 2)]
    assert one.threshold("hook_embed") == SUMS
    below, above = (one.moved(made(size * SUMS, 3), colds) for size in (0.5, 3.0))
    assert below is not None
    assert above is not None
    assert (below.past, above.past) == (False, True)


def rounded(rows: Rows, layers: int, dtype: str, rng: np.random.Generator) -> Rows:
    """Rows of which each layer added two outputs that were rounded, up or down by chance."""
    out = {}
    for name, held in rows.items():
        layer = -1 if name == "hook_embed" else int(name.split(".")[1])
        x = held.rows.astype(np.float64)
        for _ in range(2 * (min(layer, layers) + 1)):
            ulp = 2 * ROUNDOFF[dtype] * 2.0 ** np.floor(np.log2(np.abs(x)))
            x = (np.floor(x / ulp + rng.random(x.shape))) * ulp
        out[name] = Held(held.position, x.astype(np.float32))
    return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_that_are_rounded_independently_at_each_step_are_below_the_least_threshold(dtype: str) -> None:
    one, rng = Floor(dtype), np.random.default_rng(5)
    right = made(0.0, 1)
    one.add([right, right])  # a server that is exactly repeatable
    again = [rounded(right, 11, dtype, rng) for _ in range(20)]
    found = [one.moved(a, [b, b]) for a, b in itertools.pairwise(again)]
    assert [m for m in found if m is None or m.past] == []
    assert all(m is not None and m.distance > m.threshold / 4 for m in found)  # and not by much


def test_entries_that_are_coarser_than_the_model_raise_the_least_threshold() -> None:
    fine, coarse = Floor("bfloat16", "auto"), Floor("bfloat16", "fp8_e4m3")
    for one in (fine, coarse):
        one.add([made(0.0, 1), made(0.0, 2)])
    assert fine.threshold("blocks.2.hook_resid_post") * 16 == coarse.threshold("blocks.2.hook_resid_post")


def test_rows_that_are_no_numbers_where_computed_ones_are_are_past_any_threshold() -> None:
    broken = made(0.0, 1)
    broken["blocks.2.hook_resid_post"].rows[:] = math.nan
    moved = floor(1e-4).moved(broken, [made(1e-4, 2), made(1e-4, 3)])
    assert moved is not None
    assert (moved.hook_point, moved.distance) == ("blocks.2.hook_resid_post", math.inf)


def test_only_positions_that_both_have_are_compared_and_too_few_say_nothing() -> None:
    rows = made(0.0, 1)["hook_embed"]
    part = Held(rows.position[5:12], rows.rows[5:12])
    at, apart = distances(part, rows)
    assert (at.tolist(), apart.tolist()) == (list(range(35, 42)), [0.0] * 7)
    assert len(at) < LEAST_POSITIONS
    assert floor(1e-4).moved({"hook_embed": part}, [made(0.0, 1), made(0.0, 2)]) is None
    assert Floor("float32").moved({}, [made(0.0, 1), made(0.0, 2)]) is None
