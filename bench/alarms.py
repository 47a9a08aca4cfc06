"""What alarms of the monitor are worth: false ones without a change, and how soon a planted shift is found; beside them
ADWIN of the package `river`.

    python bench/alarms.py        # needs `pip install 'sglang-probe[monitor]'`, no engine; prints a section

It asks the product's own functions. A stream is of scores of 150 requests, ranked against a reference of n.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sglang_probe.monitor.adwin import adwin_alarms
from sglang_probe.monitor.alarms import Judge
from sglang_probe.monitor.conformal import Array, e_values, first_alarm, sequential_p_values, shiryaev_roberts

STREAMS, LENGTH, RATE, SHARE, AT = 10_000, 150, 0.002, 0.05, 50
REFERENCES = (20, 50, 100, 400)
DELTA = 0.002
"""Of ADWIN: its default."""
Draw = Callable[[np.random.Generator, tuple[int, int]], Array]
SCORES: dict[str, Draw] = {
    "normal": lambda g, shape: g.standard_normal(shape),
    "lognormal, sigma 1": lambda g, shape: g.lognormal(0, 1, shape),
    "counts of mean 2 (ties)": lambda g, shape: g.poisson(2, shape).astype(np.float64),
}


def e_detector(stream_ST: Array, reference_SN: Array) -> Array:
    """Place of the first alarm of each stream; -1: none."""
    return first_alarm(shiryaev_roberts(e_values(sequential_p_values(stream_ST, reference_SN))), RATE)


def adwin(stream_ST: Array, reference_SN: Array) -> Array:
    """The same by ADWIN, which sees the reference first; what it says of that does not count."""
    n, found = reference_SN.shape[1], np.full(len(stream_ST), -1)
    for i, (stream, reference) in enumerate(zip(stream_ST, reference_SN, strict=True)):
        later = [at - n for at in adwin_alarms(np.concatenate([reference, stream]), DELTA) if at >= n]
        found[i] = later[0] if later else -1
    return found


def drawn(draw: Draw, n: int, shift: float = 0.0) -> tuple[Array, Array]:
    """Streams, shifted from place `AT` on, and a reference of each."""
    g = np.random.default_rng(n)
    stream, reference = draw(g, (STREAMS, LENGTH)), draw(g, (STREAMS, n))
    stream[:, AT:] += shift
    return stream, reference


def told(at_S: Array) -> list[str]:
    """Of streams with a shift: found past it, median delay, alarms before it."""
    found = at_S >= AT
    delay = f"{np.median(at_S[found]) - AT + 1:.0f}" if found.any() else "-"
    return [f"{found.mean():.3f}", delay, f"{((at_S >= 0) & (at_S < AT)).mean():.3f}"]


def several(statistics: int = 20, streams: int = 1_000, references: int = 400) -> tuple[float, float]:
    """By `Judge`, of many statistics that depend on each other: share of single requests that alarm at `SHARE`, and of
    streams whose detectors alarm."""
    g = np.random.default_rng(7)
    single, drifted, length = 0, 0, LENGTH // 3
    for _ in range(streams):
        common = g.standard_normal((references + length, 1))
        scores = common + g.standard_normal((references + length, statistics))
        judge = Judge(scores[:references], share=SHARE, rate=RATE)
        verdicts = [judge.judge(x) for x in scores[references:]]
        single += sum(v.alarm for v in verdicts)
        drifted += bool((judge.since_S >= 0).any())
    return single / (streams * length), drifted / streams


def soon(n: int, shift: float, *, statistics: int = 14, rate: float = 0.001, streams: int = 2_000) -> str:
    """Requests until one of several detectors alarms, of streams that are shifted from their first request on: median
    over those that alarm within `LENGTH`, and their share."""
    g = np.random.default_rng(n)
    stream, reference = g.standard_normal((streams, LENGTH)) + shift, g.standard_normal((streams, n))
    e = e_values(sequential_p_values(stream, reference))
    at = first_alarm(shiryaev_roberts(e), rate / statistics)
    found = at >= 0
    return f"{np.median(at[found]) + 1:.0f} ({found.mean():.2f})" if found.any() else "-"


def main() -> None:
    print("## Alarms of a monitor\n")
    print(
        f"`python bench/alarms.py`: {STREAMS:,} streams of {LENGTH} requests a cell, one statistic, rate {RATE}, so "
        f"that at most {RATE * LENGTH:.0%} of the streams may alarm falsely. *ADWIN*: of `river`, which sees the "
        f"reference first, at its default delta of {DELTA}; that is no rate of a stream.\n"
    )
    print("Share of streams without a change that alarm: the product's e-detector / ADWIN.\n")
    print("| scores | " + " | ".join(f"{n} references" for n in REFERENCES) + " |\n|---|" + "---|" * len(REFERENCES))
    for name, draw in SCORES.items():
        cells = [f"{(e_detector(*x) >= 0).mean():.4f} / {(adwin(*x) >= 0).mean():.4f}" for x in _all(draw)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"\nNormal scores that shift by one standard deviation at request {AT + 1}: e-detector / ADWIN.\n")
    print(f"| references | found within {LENGTH - AT} requests | median delay | alarms before |\n|---|---|---|---|")
    for n, x in zip(REFERENCES, _all(SCORES["normal"], 1.0), strict=True):
        both = zip(told(e_detector(*x)), told(adwin(*x)), strict=True)
        print(f"| {n} | " + " | ".join(" / ".join(pair) for pair in both) + " |", flush=True)
    shifts = (1.0, 2.0, 3.0)
    print(
        "\nRequests until a server's monitor alarms (rate 0.001 over 14 statistics, of which one has shifted before "
        f"the first request): median over the streams that alarm within {LENGTH} (their share of 2,000 streams).\n"
    )
    print("| references | " + " | ".join(f"{s:g} SD" for s in shifts) + " |\n|---|" + "---|" * len(shifts))
    for n in (80, 200, 400, 1000):
        print(f"| {n} | " + " | ".join(soon(n, s) for s in shifts) + " |", flush=True)
    single, drifted = several()
    print(
        f"\nTwenty statistics that depend on each other (correlation 1/2), 400 references, 1,000 streams of "
        f"{LENGTH // 3}: {single:.4f} of single requests alarm falsely at a share of {SHARE}, and {drifted:.4f} of the "
        f"streams at a nominal {RATE * (LENGTH // 3):g}."
    )


def _all(draw: Draw, shift: float = 0.0) -> list[tuple[Array, Array]]:
    return [drawn(draw, n, shift) for n in REFERENCES]


if __name__ == "__main__":
    main()
