"""Two recordings of the same requests through one SAE: numerics, rates, directions, and latents that split or merge.

Rows are paired by request and position, so that every text has as many in one regime as in the other. The texts that
are exchanged, halved and counted are families of requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae import splits as splitting
from sglang_probe.sae.codes import Codes, codes, same_token_jaccard
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.sae.harvested import Harvested, harvested, refuse_mixed_models
from sglang_probe.sae.manifest import facts_of_run, refuse_other_model
from sglang_probe.sae.overlap import overlap, rate_drift
from sglang_probe.sae.rotation import rotation
from sglang_probe.sae.sae import SAE
from sglang_probe.stats.intervals import LEAST_CLUSTERS, mean_intervals, mean_p
from sglang_probe.studies.base import Measured, Tell

Array = np.ndarray[Any, Any]
COMMONEST = (50, 100, 200)
DISCOVERED = 0.05
"""False discovery rate of what is called one."""
KEY = ["rid", "position"]


@dataclass(frozen=True)
class Pair:
    """Rows of the same requests and positions from two runs."""

    first: Harvested
    second: Harvested
    text_N: Array
    """Number of the family of each row."""
    same_N: Array
    """Whether both runs had the same tokens up to and including the position."""


@dataclass(frozen=True)
class OverlapResult(Measured):
    """What was found; `first` and `second` are the regimes."""

    sae: str
    hook_point: str
    weights: str
    names: tuple[str, str]
    runs: Sequence[Mapping[str, Any]]
    rows: int
    texts: int
    same_tokens: int
    numerics: pd.DataFrame
    """Of rows of the same tokens: `rows`, `jaccard` (mean over texts) with interval, `identical` (share of rows in
    which the same latents fire)."""
    active: pd.DataFrame
    """L0 of either regime: `regime`, `mean`, quantiles; and of the difference."""
    sets: pd.DataFrame
    """By `n` (commonest latents) and of the rank correlation of all rates: the value and its nulls."""
    drift: pd.DataFrame
    """`sae.overlap.rate_drift`."""
    rotated: pd.DataFrame
    turned: pd.DataFrame
    """`sae.rotation.Rotation`: its summary, and its latents."""
    splits: pd.DataFrame
    """`sae.splits.against`; empty where no other dictionary was given."""
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """The numbers; of latents the counts."""
        drift, turned = self.drift, self.turned
        return {
            "sae": self.sae,
            "hook_point": self.hook_point,
            "weights_sha256": self.weights,
            "regimes": dict(zip(("first", "second"), self.names, strict=True)),
            "runs": list(self.runs),
            "rows": self.rows,
            "texts": self.texts,
            "rows_of_the_same_tokens": self.same_tokens,
            "numerics": self.numerics.to_dict("records"),
            "active": self.active.to_dict("records"),
            "sets": self.sets.to_dict("records"),
            "rate_drift": {
                "tested": len(drift),
                "discovered": int((drift["q"] <= DISCOVERED).sum()),
                "p_below_0.05": int((drift["p"] <= 0.05).sum()),
                "mean_absolute_log2": float(drift["log2"].abs().mean()) if len(drift) else None,
            },
            "rotation": {
                "tested": len(turned),
                "discovered": int((turned["q"] <= DISCOVERED).sum()),
                "summary": self.rotated.to_dict("records"),
            },
            "splits": self.splits.to_dict("records"),
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """All of it."""
        names = ("numerics", "active", "sets", "drift", "rotated", "turned", "splits")
        return {name: getattr(self, name) for name in names}


def study_overlap(
    folder: Path,
    paths: tuple[Path, Path],
    *,
    where: tuple[str | None, str | None] = (None, None),
    sinks: Sinks | None = None,
    most: int = 40_000,
    other: Path | None = None,
    floors: Sequence[Path] = (),
    draws: int = 999,
    tell: Tell = lambda _: None,
) -> OverlapResult:
    """Compare two runs through one SAE.

    Args:
        where: of either run, as `Run.iter_batches`; a position takes part if it fits in both.
        most: positions, drawn at random.
        other: a dictionary of the second regime, in which latents may be split or merged.
        floors: dictionaries of the first regime with other seeds, whose splits and merges say what seeds alone do.

    Raises:
        ConfigError: the SAE cannot be read or is of another model; `other` without `floors`; the runs share no rows,
            or fewer than six families.
        RunDirectoryError: a run cannot be read, or lacks the hook point.
    """
    if other is not None and not floors:
        raise ConfigError(
            "splits and merges mean nothing without those between seeds",
            fix="give `--floor` a dictionary of the first regime with another seed",
        )
    sae = read_sae(folder)
    if sae.hook_point is None:
        raise ConfigError(f"{folder} does not say where its rows come from")
    runs = [load_run(p) for p in paths]
    refuse_mixed_models(runs)
    known = refuse_other_model(sae, runs, str(folder))
    tell("reading rows")
    pair = paired(runs, sae.hook_point, where, sinks or Sinks(), most)
    texts = int(pair.text_N.max()) + 1
    if texts < LEAST_CLUSTERS:
        raise ConfigError(
            f"the runs share rows of {texts} families of requests, and regimes are compared over at least "
            f"{LEAST_CLUSTERS}",
            fix="record more texts",
        )
    tell("encoding")
    a, b = (codes(sae, x.batches(), pair.text_N, texts) for x in (pair.first, pair.second))
    tell("rates")
    drift = rate_drift(a.fired_TM, b.fired_TM, (a.rows_T, b.rows_T))
    tell("directions")
    turns = rotation(a, b, sae.W_dec.double().numpy(), draws=draws)
    dictionaries = {"of the second regime": other} if other is not None else {}
    dictionaries |= {f"another seed ({p.name})": p for p in floors}
    notes = [] if known else ["whether the SAE and the rows are of the same weights is not known"]
    if len(drift) * 2.0 ** (1 - texts) > DISCOVERED:
        notes.append(
            f"{texts} texts cannot single out one of {len(drift):,} features by its rate (a p-value of theirs is at "
            f"least 1/{2 ** (texts - 1):,}): no discovery says nothing here"
        )
    if not pair.same_N.any():
        notes.append("no row of the two runs has the same tokens before it: nothing here is numerics alone")
    if pair.same_N.all():
        notes.append("all rows are of the same tokens: whatever differs is numerics, nothing is content")
    return OverlapResult(
        folder.name,
        sae.hook_point,
        weights_sha256(folder),
        _names(runs),
        [facts_of_run(r) for r in runs],
        len(pair.text_N),
        texts,
        int(pair.same_N.sum()),
        _numerics(a, b, pair.same_N),
        _active(a, b, _names(runs)),
        _sets(a, b, draws),
        drift,
        turns.summary,
        turns.latents,
        _splits(sae, pair.first, dictionaries),
        notes,
    )


def paired(runs: Sequence[Run], hook_point: str, where: tuple[str | None, str | None], sinks: Sinks, most: int) -> Pair:
    """Rows that both runs have of one request and position, none of them a sink in either.

    Raises:
        ConfigError: there are none.
        RunDirectoryError: as `harvested`.
    """
    rows = [harvested([r], hook_point, where=w, sinks=sinks) for r, w in zip(runs, where, strict=True)]
    at = [x.tokens[[*KEY, "family"]].assign(**{f"at_{i}": np.arange(len(x))}) for i, x in enumerate(rows)]
    both = at[0].merge(at[1].drop(columns="family"), on=KEY, validate="one_to_one").sort_values(KEY)
    if not len(both):
        raise ConfigError(
            f"{runs[0].path} and {runs[1].path} have no rows of the same requests and positions",
            fix="compare recordings of the same requests, e.g. arms of one experiment; see `--where`",
        )
    if len(both) > most:
        both = both.iloc[np.sort(np.random.default_rng(0).choice(len(both), most, replace=False))]
    shared = _shared_tokens(runs)
    same = both["position"].to_numpy() < both["rid"].map(shared).fillna(0).to_numpy()
    text = pd.factorize(both["family"], sort=True)[0].astype(np.int64)
    first, second = (x.only(both[f"at_{i}"].to_numpy(copy=True)) for i, x in enumerate(rows))
    return Pair(first, second, text, np.asarray(same))


def _shared_tokens(runs: Sequence[Run]) -> dict[str, int]:
    """Of each request how many tokens both runs have alike from the start; 0 where ids were not recorded. Of a token
    that was withheld (-1) nobody knows."""
    ids = []
    for run in runs:
        frame = run.requests()
        outputs = [() if o is None else o for o in frame["output_ids"]]
        known = [
            (r, [*p, *o]) for r, p, o in zip(frame["rid"], frame["prompt_ids"], outputs, strict=True) if p is not None
        ]
        ids.append(dict(known))
    shared = {}
    for rid in ids[0].keys() & ids[1].keys():
        n = min(len(i[rid]) for i in ids)
        a, b = (np.asarray(i[rid][:n], np.int64) for i in ids)
        differs = np.flatnonzero((a != b) | (a < 0))
        shared[rid] = int(differs[0]) if len(differs) else n
    return shared


def _names(runs: Sequence[Run]) -> tuple[str, str]:
    a, b = (r.path.resolve().name for r in runs)
    return (a, b) if a != b else (f"{a} (first)", f"{b} (second)")


def _numerics(a: Codes, b: Codes, same_N: Array) -> pd.DataFrame:
    columns = ["rows", "jaccard", "jaccard_low", "jaccard_high", "identical"]
    if not same_N.any():
        return pd.DataFrame(columns=columns)
    each = same_token_jaccard(a.z_NM[same_N], b.z_NM[same_N])
    by_text = pd.Series(each).groupby(a.text_N[same_N]).mean().to_numpy()[:, None]
    found = mean_intervals(by_text, bounds=(0, 1))
    ends = [float(x[0]) for x in (found.estimate, found.low, found.high)]
    return pd.DataFrame([[len(each), *ends, float((each == 1).mean())]], columns=columns)


def _active(a: Codes, b: Codes, names: tuple[str, str]) -> pd.DataFrame:
    """The distribution of active latents, and by how many a row of the second regime has more."""
    rows, means = [], []
    for name, c in zip(names, (a, b), strict=True):
        q = np.quantile(c.active, [0.05, 0.5, 0.95])
        means.append(np.bincount(c.text_N, weights=c.active, minlength=c.texts) / c.rows_T)
        rows.append({"regime": name, "mean": c.active.mean(), "low": q[0], "median": q[1], "high": q[2]})
    apart = (means[1] - means[0])[:, None]
    found = mean_intervals(apart)
    more = {"mean": found.estimate, "mean_low": found.low, "mean_high": found.high, "p": mean_p(apart)}
    rows.append({"regime": "second minus first", **{k: float(v[0]) for k, v in more.items()}})
    return pd.DataFrame(rows)


def _sets(a: Codes, b: Codes, draws: int) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    parts = ("", "_swapped", "_swapped_low", "_p", "_halves", "_across")
    for n in COMMONEST:
        if n < a.z_NM.shape[1]:
            found = overlap(a.fired_TM, b.fired_TM, n=n, draws=min(draws, 200))
            rows.append({"statistic": f"{n} commonest shared", **{p or "value": found[f"jaccard{p}"] for p in parts}})
    found = overlap(a.fired_TM, b.fired_TM, n=1, draws=min(draws, 200))
    rows.append({"statistic": "rank correlation", **{p or "value": found[f"rank{p}"] for p in parts}})
    return pd.DataFrame(rows).rename(columns=lambda c: c.removeprefix("_"))


def _splits(sae: SAE, rows: Harvested, dictionaries: Mapping[str, Path]) -> pd.DataFrame:
    def of(other: SAE) -> tuple[Array, Any]:
        text = np.zeros(len(rows), np.int64)
        return other.W_dec.double().numpy(), codes(other, rows.batches(), text).z_NM

    if not dictionaries:
        return pd.DataFrame(columns=["dictionary", "latents", "splits", "other_latents", "merges"])
    others = {name: read_sae(path) for name, path in dictionaries.items()}
    for name, other in others.items():
        if other.width != sae.width or other.hook_point not in (None, sae.hook_point):
            raise ConfigError(f"the dictionary {name} is not of the same hook point: {other.hook_point}")
    return splitting.against(of(sae), {name: of(other) for name, other in others.items()})
