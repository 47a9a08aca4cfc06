"""Two sets of prompts, told apart: one row a prompt, from recorded runs, and how well held-out prompts are separated.

A row of the residual stream after a layer is of one position. Position 0 and rows of more than ten times the median
norm (attention sinks) are left out: behind some layers they hold nearly all of the variance and nothing of the text.
Rows of positions that were intervened on are left out as well: they are another model's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sglang_probe.errors import ConfigError
from sglang_probe.run import journal, schema
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run
from sglang_probe.run.weights import weight_hash
from sglang_probe.stats.auc import auc_interval
from sglang_probe.stats.intervals import Interval

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
Phase = Literal["prefill", "decode"]
Place = Literal["last", "mean"]
SINK = 10.0
"""Rows longer than so many times the median are sinks (dictionary_learning: `max_activation_norm_multiple`)."""
_CHUNK = 1 << 14


@dataclass(frozen=True)
class Rows:
    """One row a request, float64 `[n, d]`, and what it was made of."""

    x_ND: Array
    rids: tuple[str, ...]
    family: tuple[str, ...]
    """Of each, as the workload says; of a request without one, its prompt: equal prompts are one text."""
    positions: int
    """Rows that were used."""
    sinks: int
    """Rows that were left out by position or norm."""
    intervened: int
    """Rows that were left out because their position had been intervened on."""
    norms: Array
    """Of all rows of the phase that could be used, `[m]`."""

    def __len__(self) -> int:
        return len(self.rids)

    def told(self) -> dict[str, Any]:
        """Counts for a card."""
        return {
            "requests": len(self),
            "families": len(set(self.family)),
            "positions": self.positions,
            "left_out": {"sinks": self.sinks, "intervened": self.intervened},
        }


def rows_of(run: Run, hook_point: str, *, phase: Phase, place: Place) -> Rows:
    """One row for each served request of a run.

    Args:
        phase: `prefill`: positions of the prompt; `decode`: those of generated tokens (step 1 is the first of them).
        place: `last`: the row of the last such position; `mean`: the mean over all of them.

    Raises:
        ConfigError: the run does not hold such a row of any request.
        RunDirectoryError: it does not hold the hook point.
    """
    index, number, sinks, intervened, norms = _usable(run, hook_point, phase)
    requests = run.requests()
    if place == "last":
        last = run.requests()["prompt_len"].to_numpy(np.int64) - 1
        at = _last_of(index, number, last if phase == "prefill" else None)
        index, number = {k: v[at] for k, v in index.items()}, number[at]
    if not len(number):
        raise ConfigError(
            f"{run.path} holds no row of `{hook_point}` to use: {_lacking(phase, place)}",
            fix="record it with `rows` that select these positions, or leave `rows` out",
        )
    used, place_of = np.unique(number, return_inverse=True)
    sums, counts = None, np.bincount(place_of).astype(np.float64)
    for begin in range(0, len(number), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        x = run.rows(hook_point, index["row"][part]).double().numpy()
        sums = np.zeros((len(used), x.shape[1])) if sums is None else sums
        np.add.at(sums, place_of[part], x)
    assert sums is not None
    asked = requests.iloc[used]
    return Rows(
        x_ND=sums / counts[:, None],
        rids=tuple(map(str, asked["rid"])),
        family=tuple(_family(run, r) for r in asked.itertuples()),
        positions=len(number),
        sinks=sinks,
        intervened=intervened,
        norms=norms,
    )


def mean_norm(sets: Sequence[Rows]) -> float:
    """Mean norm of the rows at the hook point, sinks left out."""
    return float(np.concatenate([rows.norms for rows in sets]).mean())


def sample_rows(run: Run, hook_point: str, *, rows: int, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Rows of a run at random, float64 `[n, d]`, without sinks and intervened ones, and what was left out.

    Args:
        rows: so many at most.

    Raises:
        ConfigError: the run holds fewer than two.
    """
    index, _number, sinks, intervened, norms = _usable(run, hook_point, None)
    chosen = np.unique(index["row"])
    if len(chosen) < 2:
        raise ConfigError(f"{run.path} holds {len(chosen)} rows of `{hook_point}` to use, and two are the least")
    if len(chosen) > rows:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, rows, replace=False))
    told = {
        "rows": len(chosen),
        "left_out": {"sinks": sinks, "intervened": intervened},
        "mean_norm": float(norms.mean()),
    }
    return run.rows(hook_point, chosen).double(), told


def _usable(run: Run, hook_point: str, phase: Phase | None) -> tuple[dict[str, Array], Array, int, int, Array]:
    """Row and position of every usable position, the number of its request, how many were sinks and how many were
    intervened on, and the norms of the usable."""
    tokens = run.tokens()
    tokens = tokens[tokens["phase"] != schema.OVERSHOOT]
    tokens = tokens[run.holds(hook_point, tokens["source_row"].to_numpy())]
    requests = run.requests()
    of = {rid: i for i, rid in enumerate(requests["rid"])}
    tokens = tokens.assign(number=tokens["rid"].map(of).to_numpy(np.int64))
    prompt_len = requests["prompt_len"].to_numpy(np.int64)[tokens["number"].to_numpy()]
    if phase is not None:
        tokens = tokens[(tokens["position"].to_numpy() < prompt_len) == (phase == "prefill")]
    before = len(tokens)
    if "intervention" in tokens.columns:
        tokens = tokens[tokens["intervention"].isna()]
    intervened = before - len(tokens)
    row, position = (tokens[c].to_numpy(np.int64) for c in ("source_row", "position"))
    norms = _norms(run, hook_point, row)
    usable = position > 0
    if usable.any():
        usable &= norms <= SINK * np.median(norms[usable])
    found = {"row": row[usable], "position": position[usable]}
    return found, tokens["number"].to_numpy(np.int64)[usable], int((~usable).sum()), intervened, norms[usable]


def _family(run: Run, request: Any) -> str:
    if isinstance(request.family, str):
        return f"family {request.family}"
    if request.prompt_ids is None:  # of a live recording without ids
        return f"request {request.rid} of {run.path}"
    return "prompt " + hashlib.sha256(np.asarray(request.prompt_ids, dtype=np.int32).tobytes()).hexdigest()


def _norms(run: Run, hook_point: str, rows: Array) -> Array:
    chunks = (rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK))
    found = [run.rows(hook_point, c).double().norm(dim=1).numpy() for c in chunks]
    return np.concatenate(found) if found else np.empty(0)


def _last_of(index: Mapping[str, Array], number: Array, must_be: Array | None) -> Array:
    """Where the last position of each request is, which is the one of `must_be` if that is given."""
    order = np.lexsort((index["position"], number))
    ends = order[np.flatnonzero(np.diff(number[order], append=-1))]
    return ends if must_be is None else ends[index["position"][ends] == must_be[number[ends]]]


def _lacking(phase: Phase, place: Place) -> str:
    what = "the prompt" if phase == "prefill" else "generated tokens"
    return f"no request has one at {'the last position of ' if place == 'last' else 'a position of '}{what}"


@dataclass(frozen=True)
class Split:
    """Rows to make something from, and rows to judge it by, one of a family; their numbers, ascending."""

    train: Array
    held_out: Array


def split(sets: Sequence[Rows], *, share: float, seed: int) -> list[Split]:
    """Hold out a share of the families, drawn by a seed, and of each held-out family the first request of each set.

    Sets that have families in common hold out the same ones, so that no text is on both sides.

    Raises:
        ConfigError: of a set nothing is left to make something from.
    """
    families = [list(dict.fromkeys(rows.family)) for rows in sets]
    union = list(dict.fromkeys(f for names in families for f in names))
    if len(union) < sum(map(len, families)):
        families = [union]
    rng = np.random.default_rng(seed)
    out: set[str] = set()
    for names in families:
        out |= {names[i] for i in rng.permutation(len(names))[: round(share * len(names))]}
    found = []
    for rows in sets:
        held: dict[str, int] = {}
        for i, f in enumerate(rows.family):
            if f in out:
                held.setdefault(f, i)
        train = [i for i, f in enumerate(rows.family) if f not in out]
        if not train:
            raise ConfigError(f"{len(rows)} prompts are too few: some are held out, and none is left", fix="give more")
        found.append(Split(np.array(train), np.array(sorted(held.values()), dtype=np.int64)))
    return found


@dataclass(frozen=True)
class Separation:
    """How well a direction made from some prompts tells others apart."""

    auc: Interval
    cosine: float
    """Of the direction with the one that the held-out prompts give by themselves; NaN without any."""
    held_out: tuple[int, int]
    """Prompts of either kind."""

    def told(self) -> dict[str, Any]:
        """For a card. Ends are null where there is no interval (fewer than six prompts of a kind)."""
        return {
            "held_out_auc": interval_told(self.auc),
            "split_half_cosine": number_told(self.cosine),
            "held_out_prompts": list(self.held_out),
        }


def mean_difference(positive_ND: Array, negative_ND: Array) -> Array:
    """The difference of the means, float64 `[d]`."""
    return np.asarray(positive_ND.mean(axis=0) - negative_ND.mean(axis=0))


def separation(positive: Rows, negative: Rows, *, seed: int, share: float = 0.5) -> Separation:
    """The mean difference of some prompts, judged by the others.

    What it says holds for a vector made the same way from so many prompts fewer.

    Raises:
        ConfigError: as `split`.
    """
    a, b = split([positive, negative], share=share, seed=seed)
    v = mean_difference(positive.x_ND[a.train], negative.x_ND[b.train])
    held_a, held_b = positive.x_ND[a.held_out], negative.x_ND[b.held_out]
    cosine = float("nan")
    if len(held_a) and len(held_b):
        other = mean_difference(held_a, held_b)
        cosine = float(v @ other / (np.linalg.norm(v) * np.linalg.norm(other)))
    return Separation(auc_interval(held_a @ v, held_b @ v), cosine, (len(held_a), len(held_b)))


def interval_told(found: Interval) -> dict[str, float | None]:
    """An interval as JSON."""
    return {name: number_told(float(getattr(found, name))) for name in ("estimate", "low", "high")}


def number_told(x: float) -> float | None:
    """A number as JSON, which has no NaN."""
    return None if x != x else x


def origin(run: Run) -> dict[str, Any]:
    """What a run is, for the card of what is made from it."""
    return {"run": run.manifest.get("name", run.path.name), "manifest_sha256": journal.sha256(run.path / MANIFEST)}


def inputs(positive: Run, negative: Run, a: Rows, b: Rows) -> dict[str, Any]:
    """Both runs and what was taken of them, for the card of what is made from the two."""
    return {"positive": {**origin(positive), **a.told()}, "negative": {**origin(negative), **b.told()}}


def without_path(model: str) -> str:
    """Name of a model; of one that was named by its folder, the folder's own: clients read cards, and where the model
    lies is none of their business."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model


def model_of(runs: Sequence[Run]) -> tuple[str, str]:
    """Name and weight hash of the model that all these runs are of.

    Raises:
        ConfigError: they are of several, a run does not say which, or its weights were updated while it was recorded.
    """
    found: dict[str, str] = {}
    for run in runs:
        model = run.manifest.get("model") or {}
        digest = weight_hash(model.get("weights_sha256"))
        if digest is None:
            raise ConfigError(
                f"{run.path} does not say which weights it is of",
                fix="record it from a model in a folder; live segments and runs of hub models that were not fetched do "
                "not have the hash",
            )
        weights = run.forwards()["weights"].dropna()
        if len(weights) and weights.max() > 0:
            raise ConfigError(f"the weights were updated while {run.path} was recorded", fix="record it again")
        found[digest] = without_path(str(model.get("name")))
    if len(found) != 1:
        raise ConfigError(f"the runs are of {len(found)} models: {', '.join(found.values())}", fix="give runs of one")
    return next((name, digest) for digest, name in found.items())
