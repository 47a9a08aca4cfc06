"""Labels without a model, and what a label is worth: the token-set rule, detection, fuzzing, and their nulls.

The rule names the at most ten tokens on which a latent fires, found on one half of the texts. It is judged on the other
half by the two scores of delphi (Paulo et al. 2410.13928): *detection*, which of as many windows in which the latent
fires and in which it does not hold what the label says; *fuzzing*, which of two markings of a firing window, of the
tokens where it fires or of as many others, fits the label. Both are balanced accuracies: 0.5 is chance.

A score is worth what it has beyond the labels of *other* latents, and beyond *random directions* that fire as often
(Heap et al. 2501.17727 find that such scores are much alike for random models).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.sae.coded_run import Coded

Array = np.ndarray[Any, Any]
MOST_TOKENS = 10
WINDOWS = 20
"""Windows of each kind that a latent is judged by, at most."""
LEAST_WINDOWS = 4
BEFORE, AFTER = 8, 4
"""Tokens of a window around its place."""


@dataclass(frozen=True)
class Rules:
    """The token-set rule of each of M latents."""

    tokens: list[Array]
    """Token ids, the surest first."""
    f1: Array
    """Of the rule on the texts that it was found on, `[M]`; NaN of latents that do not fire there."""
    precision: Array
    """Share of rows with one of the tokens in which the latent fires."""
    recall: Array
    """Share of rows in which it fires that have one of the tokens."""


def halves(family_T: Sequence[str], seed: int = 0) -> Array:
    """Which texts are for finding labels, bool `[T]`; the others judge them. A family is on one side: texts that share
    a beginning, or are the same text in two runs, would judge labels by what they were found on."""
    family, known = pd.factorize(np.asarray(family_T, dtype=object))
    first = np.zeros(len(known), dtype=bool)
    first[np.random.default_rng(seed).permutation(len(known))[: (len(known) + 1) // 2]] = True
    return np.asarray(first[family])


def fired(codes: Any) -> Any:
    """Where latents fire: the same matrix with 1 for every activation."""
    fires = codes.copy()
    fires.data = np.ones_like(fires.data)
    return fires


def token_rules(fires: Any, token_N: Array, *, most: int = MOST_TOKENS) -> Rules:
    """Find the rules: of the tokens that belong in the set with the best F1, the `most` on which the latent fires most
    often; of these the first few that have the best F1 together.

    Args:
        fires: scipy CSR `[N, M]` of 0 and 1.
        token_N: token of each row.
    """
    from scipy import sparse

    known, code = np.unique(token_N, return_inverse=True)
    one = sparse.csr_array(
        (np.ones(len(code), np.float32), (code, np.arange(len(code)))), shape=(len(known), len(code))
    )
    both = (one @ fires.astype(np.float32)).tocsc()
    total = np.bincount(code, minlength=len(known)).astype(np.float64)
    fired = np.asarray(fires.sum(0)).ravel().astype(np.float64)
    latents = fires.shape[1]
    tokens: list[Array] = []
    scores = np.full((3, latents), np.nan)
    for m in range(latents):
        at = both.indices[both.indptr[m] : both.indptr[m + 1]]
        hits = both.data[both.indptr[m] : both.indptr[m + 1]].astype(np.float64)
        if not len(at):
            tokens.append(np.empty(0, np.int64))
            continue
        order = _best(hits, total[at], fired[m])[:most]
        hit, seen = hits[order].cumsum(), total[at][order].cumsum()
        f1 = 2 * hit / (seen + fired[m])
        best = int(f1.argmax())
        tokens.append(known[at[order[: best + 1]]])
        scores[:, m] = f1[best], hit[best] / seen[best], hit[best] / fired[m]
    return Rules(tokens, *scores)


def _best(hits: Array, seen: Array, fired: float) -> Array:
    """Places of the tokens of the set with the best F1, most hits first: those on which the latent fires in more than
    half of that F1 of their occurrences (Lipton et al. 1402.1892). One failure is added to each, and a
    token on which it fired once is no sign while there are others."""
    share = hits / (seen + 1) * ((hits > 1) | (hits.max() <= 1))
    order = np.argsort(-share, kind="stable")
    best = float((2 * hits[order].cumsum() / (seen[order].cumsum() + fired)).max())
    inside = np.flatnonzero(share > best / 2)
    inside = inside if len(inside) else order[:1]
    return inside[np.argsort(-hits[inside], kind="stable")]


@dataclass(frozen=True)
class Scores:
    """Balanced accuracies of M latents; NaN where there are too few windows."""

    detection: Array
    fuzzing: Array
    detection_shuffled: Array
    """The same windows judged by the label of another latent."""
    fuzzing_shuffled: Array
    windows: Array
    """Windows of each kind, int64 `[M]`."""


@dataclass(frozen=True)
class Judged:
    """What the label of a latent is judged by: n windows in which it fires and n in which it does not."""

    latent: int
    yes: list[tuple[int, int]]
    """First place and end, in `coded.ids`."""
    no: list[tuple[int, int]]
    marks: list[tuple[Array, Array]]
    """Of each `yes`: where it fires, and as many of its other tokens, bool `[length]`."""


def drawn(
    coded: Coded, fires: Any, latents: Sequence[int], judges: Array, *, most: int = WINDOWS, seed: int = 0
) -> Iterator[Judged]:
    """Windows to judge the labels of latents by; latents that have too few are passed over.

    Args:
        fires: scipy CSR `[N, M]` of 0 and 1, rows as in `coded`.
        judges: texts to judge by, bool `[texts]`.
        most: windows of each kind.
    """
    rng = np.random.default_rng([seed, 1])
    mine = np.flatnonzero(judges[coded.text_of_row])
    flat = coded.rows["flat"].to_numpy()
    by_latent = fires[mine].tocsc()
    fired_at = np.zeros(len(coded.ids), dtype=bool)
    for m in latents:
        rows = mine[by_latent.indices[by_latent.indptr[m] : by_latent.indptr[m + 1]]]
        if len(rows) < LEAST_WINDOWS:
            continue
        fired_at[flat[rows]] = True
        yes = [coded.window(int(f), BEFORE, AFTER) for f in flat[rng.permutation(rows)[:most]]]
        no = _silent(coded, fired_at, flat[mine], len(yes), rng)
        n = min(len(yes), len(no))
        if n >= LEAST_WINDOWS:
            yes, no = yes[:n], no[:n]
            yield Judged(int(m), yes, no, [_marks(fired_at[a:b], rng) for a, b in yes])
        fired_at[flat[rows]] = False


def others(latents: Sequence[int], *, seed: int = 0) -> dict[int, int]:
    """For each latent another one, whose label it is judged by too; none where there is one latent."""
    # A random order rolled by one, read in that order, has no latent with its own label.
    order = np.random.default_rng([seed, 8]).permutation(np.asarray(latents, dtype=np.int64))
    return dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True)) if len(order) > 1 else {}


def score(coded: Coded, fires: Any, rules: Rules, judges: Array, *, seed: int = 0) -> Scores:
    """Judge the rules on some of the texts.

    Args:
        fires: scipy CSR `[N, M]` of 0 and 1, rows as in `coded`.
        judges: texts to judge by, bool `[texts]`.
    """
    named = [i for i, t in enumerate(rules.tokens) if len(t)]
    other = others(named, seed=seed)
    out = np.full((4, fires.shape[1]), np.nan)
    counts = np.zeros(fires.shape[1], dtype=np.int64)
    for w in drawn(coded, fires, named, judges, seed=seed):
        counts[w.latent] = len(w.yes)
        for i, label in enumerate((w.latent, other.get(w.latent))):
            if label is not None:
                known = rules.tokens[label]
                out[2 * i, w.latent] = _detection(coded.ids, w.yes, w.no, known)
                out[2 * i + 1, w.latent] = _fuzzing(coded.ids, w.yes, w.marks, known)
    return Scores(out[0], out[1], out[2], out[3], counts)


def _silent(coded: Coded, fired_at: Array, places: Array, n: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Windows in which the latent does not fire."""
    found: list[tuple[int, int]] = []
    for f in places[rng.integers(0, len(places), 20 * n)]:
        a, b = coded.window(int(f), BEFORE, AFTER)
        if not fired_at[a:b].any():
            found.append((a, b))
        if len(found) == n:
            break
    return found


def _marks(fired: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Right marking of a window, and one of as many of its other tokens."""
    silent = np.flatnonzero(~fired)
    wrong = np.zeros_like(fired)
    wrong[rng.permutation(silent)[: int(fired.sum())]] = True
    return fired.copy(), wrong


def _detection(ids: Array, yes: list[tuple[int, int]], no: list[tuple[int, int]], known: Array) -> float:
    right = np.mean([np.isin(ids[a:b], known).any() for a, b in yes])
    wrong = np.mean([np.isin(ids[a:b], known).any() for a, b in no])
    return float((right + 1 - wrong) / 2)


def _fuzzing(ids: Array, yes: list[tuple[int, int]], marks: list[tuple[Array, Array]], known: Array) -> float:
    """A marking fits if at least half of the marked tokens are in the set."""
    said = []
    for (a, b), (right, wrong) in zip(yes, marks, strict=True):
        fits = np.isin(ids[a:b], known)
        said.append((fits[right].mean() >= 0.5, wrong.any() and fits[wrong].mean() >= 0.5))
    good, bad = np.array(said, dtype=float).mean(0)
    return float((good + 1 - bad) / 2)


def random_directions(x_ND: Array, rates_M: Array, *, seed: int = 0) -> Any:
    """What M random unit directions are of rows, zero but in the share of rows that fires most strongly, one of the
    latents' for each: scipy CSR `[N, M]`. What a label of a direction without meaning is worth."""
    from scipy import sparse

    rng = np.random.default_rng([seed, 2])
    directions = rng.normal(size=(len(rates_M), x_ND.shape[1])).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    x = (x_ND - x_ND.mean(0)).astype(np.float32)
    columns, strengths = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for direction, rate in zip(directions, rates_M, strict=True):
        take, value = round(rate * len(x)), x @ direction
        at = np.argpartition(-value, take)[:take] if 0 < take < len(x) else np.empty(0, np.int64)
        columns.append(at)
        strengths.append(value[at] - value[at].min(initial=0.0) + 1e-3)  # all of these fire, however weakly
    place = np.concatenate([np.full(len(c), m) for m, c in enumerate(columns[1:])] or [np.empty(0, np.int64)])
    return sparse.csr_array((np.concatenate(strengths), (np.concatenate(columns), place)), shape=(len(x), len(rates_M)))


def name_of(tokens: list[str], f1: float, promoted: list[str]) -> str:
    """A heuristic label in words.

    Args:
        tokens: of the rule, the surest first.
        promoted: tokens whose logits the latent raises most.
    """
    shown = ", ".join(f"`{t}`" for t in tokens[:6]) or "nothing seen"
    said = "fires on" if f1 >= 0.5 else "among others on"
    return f"{said} {shown}" + (f"; promotes {', '.join(f'`{t}`' for t in promoted[:3])}" if promoted else "")
