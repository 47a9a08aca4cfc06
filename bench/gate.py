"""Level and power of the verdicts of `sglang-probe gate`, by its own functions on made answers.

python bench/gate.py [GATES]     # a few minutes for 400, no engine
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from sglang_probe.gate.audit import WARM_UP
from sglang_probe.gate.judge import judge
from sglang_probe.gate.verdict import ALPHA, Verdict
from sglang_probe.report import markdown
from sglang_probe.stats.multiple import sign_flip_max
from tests.gate.made import FACTS, made, rounding
from tests.gate.test_audit import Server, auditor, candidate

GATES = int(sys.argv[1]) if len(sys.argv) > 1 else 400
SCALE = 5e-3
AUDITS = 2000
TESTS = 5 * GATES


def rates(seed: int, plant: float = 0.0, odd: float = 0.0, **given: Any) -> dict[Verdict, float]:
    """Share of gates with each verdict.

    Args:
        plant: moves one warm answer of one case by a normal of so many nats.
        odd: and one cold answer of another case.
    """
    found: dict[Verdict, float] = dict.fromkeys(Verdict, 0.0)
    for gate in range(GATES):
        rng = np.random.default_rng([seed, gate])
        cases, arms = made(rng, **given)
        for arm, case, size in (("branch-2", 3, plant), ("company-cold-1", 0, odd)):
            one = arms[arm][case]
            moved = one.prompt + size * rng.standard_normal(len(one.prompt))
            arms[arm][case] = dataclasses.replace(one, prompt=moved)
        found[judge(cases, arms, FACTS).verdict] += 1 / GATES
    return found


def row(what: str, found: dict[Verdict, float]) -> list[str]:
    return [what, *(f"{found[v]:.3f}" for v in (Verdict.WITHIN_FLOOR, Verdict.CHANGES, Verdict.WRONG))]


def level() -> Iterator[list[str]]:
    for sigma in (0.3, 0.6, 1.0):
        noise = rounding(SCALE, sigma)
        yield row(f"as cold, sigma {sigma}", rates(1, cold=noise, warm=noise))
    for ratio in (1, 2, 4, 8):
        noise = rounding(SCALE, 0.6)
        found = rates(2, cold=noise, warm=noise, shift=rounding(ratio * SCALE, 0.6))
        yield row(f"and moved alike each time, {ratio} times as far, sigma 0.6", found)
    yield row("cold exactly repeatable, a border moves by 0.005", rates(3, shift=rounding(SCALE, 0.6)))


def symmetry() -> Iterator[list[str]]:
    """Share of rejections at `ALPHA` by the test alone, of ten cases and twelve questions, each with a mean of zero."""
    draws = {
        "symmetric (normal)": lambda rng, shape: rng.standard_normal(shape),
        "skewed: seldom far below zero, else a little above (1 - exponential)": lambda rng, shape: (
            1 - rng.exponential(size=shape)
        ),
        "skewed: seldom far above zero, else a little below (exponential - 1)": lambda rng, shape: (
            rng.exponential(size=shape) - 1
        ),
    }
    for name, draw in draws.items():
        found = []
        for alike in (False, True):
            rng, rejected = np.random.default_rng(6), 0
            for _ in range(TESTS):
                x = np.repeat(draw(rng, (10, 1)), 12, axis=1) if alike else draw(rng, (10, 12))
                rejected += sign_flip_max(x).min() <= ALPHA
            found.append(f"{rejected / TESTS:.3f}")
        yield [name, *found]


def power() -> Iterator[list[str]]:
    noise = rounding(SCALE, 0.6)
    for size in (0.1, 0.2, 0.4, 0.8, 1.6):
        yield row(f"{size} nats", rates(4, plant=size, cold=noise, warm=noise))
    for size in (0.0, 0.8, 1.6):
        found = rates(5, plant=size, odd=0.8, cold=noise, warm=noise)
        yield row(f"{size} nats, and a cold answer of another case by 0.8", found)


def audits() -> Iterator[list[str]]:
    """Share of alarms among requests that are right, and among those whose entries are wrong, in one stream of which a
    twentieth is wrong."""
    for sigma in (0.3, 0.6, 1.0):
        for size in (0.01, 0.02, 0.05, 0.2):
            one = auditor(Server(lambda prompt, n, size=size: size * (prompt[0] % 20 == 19), sigma=sigma))  # type: ignore[misc]
            found = [one.audit(candidate(i)) for i in range(AUDITS)][WARM_UP:]
            alarm = {
                wrong: [a.found == "wrong" for a in found if (int(a.rid[1:]) % 20 == 19) == wrong] for wrong in (0, 1)
            }
            shares = [f"{np.mean(alarm[wrong]):.4f} of {len(alarm[wrong])}" for wrong in (0, 1)]
            yield [f"sigma {sigma}, wrong by {size} nats", *shares, f"{one.threshold:.3f}"]


def main() -> None:
    head = ["WITHIN FLOOR", "REUSE CHANGES OUTPUTS", "WRONG REUSE"]
    print(
        f"Share of {GATES} gates that got each verdict. Each has 10 cases, 6 paths, 2 orders. Rounding is lognormal\n"
        "with a median size of 0.005 nats; sigma says how much its sizes vary. *As cold*: warm answers round as cold\n"
        "ones do. *Moved alike each time*: all warm answers of a case are moved, too, by one further rounding, the\n"
        "same for all of them, and so many times as large.\n"
    )
    print(markdown.table(["warm answers", *head], list(level())))
    print(
        f"\nShare of {TESTS} tests, of ten cases and twelve questions, that reject one at least at {ALPHA},\n"
        "where the mean of each difference is zero.\n"
    )
    print(markdown.table(["differences of the cases", "questions independent", "all the same"], list(symmetry())))
    print(
        "\nOne warm answer of the hundred and twenty is wrong: each position of its tail moves by a normal number\n"
        "with a standard deviation of so many nats.\n"
    )
    print(markdown.table(["moved by", *head], list(power())))
    print(
        "\nA row is one stream of 2,000 audits, a twentieth of them of wrong entries, on a made-up server in fp32\n"
        "whose rounding is lognormal with a median size of 0.001 nats.\n"
    )
    print(
        markdown.table(["", "alarms, entries right", "alarms, entries wrong", "threshold at the end"], list(audits()))
    )


if __name__ == "__main__":
    main()
