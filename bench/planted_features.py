"""Do the statistics of dictionaries find what was planted, and nothing where nothing was? By simulation, no engine.

    python bench/planted_features.py        # a minute or two; a part of what bench/coverage_of_intervals.py prints

The rows are made as SAELens' generator makes them (`sae_lens.synthetic`: unit directions, features that fire
independently, rates that fall like Zipf's, positive magnitudes), and their dictionary is known. Seeds are fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.sae.codes import Codes, codes
from sglang_probe.sae.gap import gap
from sglang_probe.sae.match import chance, match
from sglang_probe.sae.overlap import overlap, rate_drift
from sglang_probe.sae.rotation import rotation
from sglang_probe.sae.sae import SAE
from sglang_probe.sae.splits import splits

Array = np.ndarray[Any, Any]
TEXTS, EACH, FEATURES = 24, 120, 200
CHANGED = range(40, 60)
"""Around the fiftieth: a set of the commonest does not see what changes among those that stay in it."""
ZIPF = 8 / np.arange(3, FEATURES + 3) / (1 / np.arange(3, FEATURES + 3)).sum()
ALIVE, WIDTH = 24, 48
BASIS = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]


def section() -> Iterator[str]:
    """The section of docs/evidence/statistics.md, line by line."""
    yield "## Statistics of dictionaries\n"
    yield (
        "Rows with known features (`python bench/planted_features.py`). *Level*: share of tests with a p-value of at "
        "most 5 % where nothing was planted, or of studies with a discovery at a false discovery rate of 5 %. "
        "*Recovered*: share of what was planted that is found, at the same rates.\n"
    )
    yield from _table(rows())


def rows() -> Iterator[dict[str, Any]]:
    """One row for each statistic and planted effect."""
    yield from _rates()
    yield from _directions()
    yield from _dictionaries()
    yield from _gaps()


def _counts(rng: np.random.Generator, factor: Array, change: float) -> Array:
    """Firings by text `[T, F]`; some features fire more or less often, in turns."""
    by = np.ones(FEATURES)
    by[CHANGED] = np.where(np.arange(len(CHANGED)) % 2, change, 1 / change)
    return rng.binomial(EACH, np.minimum(factor * ZIPF * by, 1))


def _rates(studies: int = 100) -> Iterator[dict[str, Any]]:
    n = (np.full(TEXTS, EACH), np.full(TEXTS, EACH))
    for change in (1.0, 1.5, 2.5):
        found: dict[str, list[float]] = {k: [] for k in ("p", "any", "true", "false", "jaccard", "rank")}
        for i in range(studies):
            rng = np.random.default_rng([i, int(10 * change)])
            factor = np.exp(0.3 * rng.normal(size=(TEXTS, FEATURES)))  # a text's own, the same in both regimes
            a, b = _counts(rng, factor, 1.0), _counts(rng, factor, change)
            drift = rate_drift(a, b, n)
            hits = set(drift[drift["q"] <= 0.05]["latent"])
            found["p"].append(float((drift["p"] <= 0.05).mean()))
            found["any"].append(bool(hits))
            found["true"].append(len(hits & set(CHANGED)) / len(CHANGED))
            found["false"].append(len(hits - set(CHANGED)) / max(len(hits), 1))
            swaps = overlap(a, b, n=50, draws=199, seed=i)
            found["jaccard"].append(swaps["jaccard_p"] <= 0.05)
            found["rank"].append(swaps["rank_p"] <= 0.05)
        mean = {k: float(np.mean(v)) for k, v in found.items()}
        if change == 1:
            yield _row("rate drift: p by feature", "nothing", mean["p"])
            yield _row("rate drift: a study with a discovery", "nothing", mean["any"])
            yield _row("50 commonest features shared", "nothing", mean["jaccard"])
            yield _row("rank correlation of rates", "nothing", mean["rank"])
        else:
            planted = f"{len(CHANGED)} of {FEATURES} rates times {change:g} or divided by it"
            yield _row("rate drift", planted, None, mean["true"], f"{mean['false']:.3f} of discoveries false")
            yield _row("50 commonest features shared", planted, None, mean["jaccard"])
            yield _row("rank correlation of rates", planted, None, mean["rank"])


def _regime(seed: list[int], degrees: float, rate: float) -> Codes:
    """Rows of 24 features by an SAE that knows them; the first points elsewhere, and fires at a rate of its own."""
    rng, angle = np.random.default_rng(seed), np.deg2rad(degrees)
    d = BASIS[:ALIVE].copy()
    d[0] = np.cos(angle) * d[0] + np.sin(angle) * BASIS[ALIVE]
    n = TEXTS * EACH // 2
    fires = rng.random((n, ALIVE)) < np.where(np.arange(ALIVE) == 0, rate, 0.08)
    noise = rng.normal(size=(n, WIDTH)) * 1.0 / WIDTH**0.5
    x = (fires * rng.uniform(1, 2, fires.shape)) @ d + noise
    known = torch.from_numpy(BASIS[:ALIVE].astype(np.float32))
    bar = torch.full((ALIVE,), 0.6)
    sae = SAE("jumprelu", known.T, known, torch.zeros(ALIVE), torch.zeros(WIDTH), threshold=bar)
    return codes(sae, [torch.from_numpy(x.astype(np.float32))], np.repeat(np.arange(TEXTS), EACH // 2))


def _directions(studies: int = 100) -> Iterator[dict[str, Any]]:
    for degrees, rate in ((0.0, 0.08), (0.0, 0.03), (10.0, 0.08), (20.0, 0.08), (30.0, 0.08)):
        turned, others, first = [], [], []
        for i in range(studies):
            a, b = _regime([i, 0], 0, 0.08), _regime([i, 1], degrees, rate)
            found = rotation(a, b, BASIS[:ALIVE], draws=499, splits=2, seed=i).latents.set_index("latent")
            if 0 not in found.index:
                continue
            turned.append(found.loc[0, "q"] <= 0.05)
            first.append(found.loc[0, "p"] <= 0.05)
            others.append(float((found.drop(index=0)["p"] <= 0.05).mean()))
        level = float(np.mean(others))
        if degrees:
            told = f"{level:.3f} of the other features at p 5 %"
            yield _row("effective direction", f"one feature turned by {degrees:g} degrees", None, np.mean(turned), told)
        elif rate == 0.08:
            yield _row("effective direction: p by feature", "nothing", level)
        else:
            yield _row(
                "effective direction: p of that feature", "one feature fires at 3 instead of 8 %", np.mean(first)
            )


def _dictionaries(studies: int = 200) -> Iterator[dict[str, Any]]:
    recovered, false, none, best, null = [], [], [], [], []
    for i in range(studies):
        rng = np.random.default_rng([i, 7])
        q = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
        d, fires, which = q[:ALIVE], rng.random((3000, ALIVE)) < 0.08, rng.random((3000, 1)) < 0.5
        noisy = d + 0.4 * rng.normal(size=d.shape) / WIDTH**0.5
        two = 0.8 * d[:1] + 0.6 * q[ALIVE : ALIVE + 2]
        halves = fires[:, :1] & np.concatenate([which, ~which], 1)
        found = splits(d, np.vstack([noisy[1:], two]), fires, np.concatenate([fires[:, 1:], halves], 1))
        recovered.append(bool(found.set_index("latent").loc[0, "split"]))
        false.append(int(found["split"].sum()) - recovered[-1])
        order = rng.permutation(ALIVE)
        none.append(int(splits(d, noisy[order], fires, fires[:, order])["split"].sum()))
        if i < 40:
            turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
            best.append(match(d, noisy[order]).mcc)
            null.append(match(d, d @ turn).mcc - chance(d, d, rotations=5, seed=i).mean())
    yield _row("splits", "nothing: another order, noise", float(np.mean(none)) / ALIVE)
    told = f"{np.mean(false):.3f} others a study"
    yield _row("splits", "one feature as two that fire in turns", None, float(np.mean(recovered)), told)
    yield _row("mean cosine of the best matching", "another order, noise of 0.4", None, None, f"{np.mean(best):.3f}")
    told = f"{np.mean(null):+.3f} (SD {np.std(null):.3f}) from its value at chance"
    yield _row("mean cosine of the best matching", "nothing: one turned at random", None, None, told)


def _gaps(studies: int = 300) -> Iterator[dict[str, Any]]:
    """The gap in reconstruction: rows of higher entropy are explained better, and one arm has more of them."""
    for shift, drift in ((0.0, 0.0), (1.0, 0.0), (1.0, 0.1)):
        within, total = [], []
        for i in range(studies):
            rng = np.random.default_rng([i, 9])
            arms = []
            for more, add in ((0.0, 0.0), (shift, drift)):
                entropy = rng.gamma(3, 0.8, (TEXTS, 40)) + more + 0.3 * rng.normal(size=(TEXTS, 1))
                error = (
                    np.exp(-0.3 * np.searchsorted((2.0, 3.0, 4.0, 5.0), entropy))
                    + add
                    + 0.05 * rng.normal(size=entropy.shape)
                )
                text = np.repeat(np.arange(TEXTS), 40)
                arms.append(
                    pd.DataFrame({"text": text, "error": error.ravel(), "entropy": np.clip(entropy, 0, None).ravel()})
                )
            found = gap(arms[0], arms[1], variance=1.0, cuts=(2.0, 3.0, 4.0, 5.0))
            for into, part in ((within, found.within), (total, found.total)):
                into.append(not bool(part.low <= 0 <= part.high))
        planted = "nothing" if not shift else "another mixture of entropies alone"
        planted = planted if not drift else "another mixture, and 0.1 more error"
        rejects = float(np.mean(within))
        told = f"of the raw gap {np.mean(total):.3f}"
        yield _row("gap within bands of entropy", planted, *((None, rejects) if drift else (rejects, None)), told)


def _row(
    statistic: str, planted: str, level: float | None, recovered: float | None = None, more: str = ""
) -> dict[str, Any]:
    shown = [("" if v is None else f"{float(v):.3f}") for v in (level, recovered)]
    return {"statistic": statistic, "planted": planted, "level": shown[0], "recovered": shown[1], "beside": more}


def _table(found: Iterator[dict[str, Any]]) -> Iterator[str]:
    for i, row in enumerate(found):
        if not i:
            yield "| " + " | ".join(row) + " |"
            yield "|" + "---|" * len(row)
        yield "| " + " | ".join(str(v) for v in row.values()) + " |"


if __name__ == "__main__":
    for line in section():
        print(line, flush=True)
