"""Answers of a server that is not there: cold ones differ by rounding, warm ones by what is planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from sglang_probe.gate.arms import Arms
from sglang_probe.gate.client import Answer, Facts
from sglang_probe.gate.judge import PATHS
from sglang_probe.gate.prompts import Case

Draw = Callable[[np.random.Generator, int], float]
TAIL, NEW, PREFIX = 40, 16, 180
FACTS = Facts(dtype="bfloat16", page_size=1, radix=True)


def case(i: int) -> Case:
    ids = tuple(range(1000 * i, 1000 * i + PREFIX + 3 * TAIL))
    parts = [ids[PREFIX + k * TAIL : PREFIX + (k + 1) * TAIL] for k in range(3)]
    return Case(f"case {i}", ids[:PREFIX], parts[0], parts[1], parts[2])


def none(_rng: np.random.Generator, _case: int) -> float:
    return 0.0


def rounding(scale: float, sigma: float) -> Draw:
    """A size of rounding that differs by case and request: lognormal with this median."""
    return lambda rng, _case: float(scale * np.exp(sigma * rng.standard_normal()))


def made(
    rng: np.random.Generator,
    *,
    cases: int = 10,
    cold: Draw = none,
    warm: Draw = none,
    shift: Draw = none,
    control: float = 1.0,
    warm_cached: int | None = None,
    cold_cached: int | None = 0,
    flip: Callable[[np.random.Generator, str], bool] = lambda rng, arm: False,
) -> tuple[list[Case], Arms]:
    """Every arm; `cold` and `warm` draw the standard deviation of an answer's log-probabilities about the true ones.

    `shift` draws what moves all warm answers of a case alike: a border rounds in the same way each time.
    """
    arms: Arms = {}
    length = {"repeat": PREFIX + TAIL - 1, "turns": PREFIX + TAIL + NEW - 1}
    for i in range(cases):
        once, turn = (-rng.gamma(2.0, 0.7, TAIL + NEW) for _ in range(2))
        moved = shift(rng, i) * rng.standard_normal(TAIL + NEW)
        for k in (1, 2):
            for base in ("cold", "turns-cold", "company-cold"):
                values = _noisy(rng, turn if base == "turns-cold" else once, cold(rng, i))
                arms.setdefault(f"{base}-{k}", {})[i] = _answer(values, cold_cached, flip(rng, f"{base}-{k}"))
            for path in PATHS:
                values = _noisy(rng, (turn if path == "turns" else once) + moved, warm(rng, i))
                cached = length.get(path, PREFIX) if warm_cached is None else warm_cached
                one = _answer(values, cached, flip(rng, f"{path}-{k}"))
                arms.setdefault(f"{path}-{k}", {})[i] = replace(
                    one, prompt=one.prompt[: 0 if path == "repeat" else TAIL]
                )
        arms.setdefault("extended", {})[i] = _answer(_noisy(rng, once, cold(rng, i)), cold_cached, False)
        for n in (1, 16):
            arms.setdefault(f"control-{n}", {})[i] = _answer(_noisy(rng, once, control), cold_cached, False)
    return [case(i) for i in range(cases)], arms


def _noisy(rng: np.random.Generator, true: np.ndarray[Any, Any], scale: float) -> np.ndarray[Any, Any]:
    return true + scale * rng.standard_normal(len(true))


def _answer(values: np.ndarray[Any, Any], cached: int | None, flipped: bool) -> Answer:
    output = [99 if flipped and i == 4 else i for i in range(NEW)]
    top = tuple({t: float(v)} for t, v in zip(output, values[TAIL:], strict=True))
    return Answer("r", cached, values[:TAIL], tuple(output), values[TAIL:], top)


def answer(**fields: Any) -> Answer:
    """One answer with two generated tokens."""
    given: dict[str, Any] = {
        "rid": "r",
        "cached": 0,
        "prompt": np.array([-1.0, -2.0]),
        "output": (5, 6),
        "chosen": np.array([-0.1, -0.2]),
        "top": ({5: -0.1, 7: -2.5}, {6: -0.2, 8: -1.9}),
    }
    return Answer(**{**given, **fields})
