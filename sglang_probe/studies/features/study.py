"""What is known of each latent of an SAE: where it fires, on what, with what, and what its label is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.axes.lexical import kind_of
from sglang_probe.axes.position import bins_of
from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.eviction.likelihood import load_unembedding
from sglang_probe.report.figures import visible
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae import labels, neighbours
from sglang_probe.sae.coded_run import Coded, code_run
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.sae.manifest import refuse_other_model
from sglang_probe.sae.sae import SAE
from sglang_probe.studies.base import Measured
from sglang_probe.studies.lens.study import checkpoint_of

Array = np.ndarray[Any, Any]
TOPS, BINS = 10, 4
PROMOTED = 8
NULL_LATENTS, NULL_ROWS = 200, 20_000
_BLOCK = 256
_MOST_RATES = 12
"""Classes of an axis that a latent's card shows."""


@dataclass(frozen=True)
class Promoted:
    """Tokens whose logits a decoder row raises and lowers most; `[M, k]`."""

    top: Array
    top_value: Array
    bottom: Array
    bottom_value: Array


@dataclass(frozen=True)
class FeaturesResult(Measured):
    """What was found of an SAE's latents on one run."""

    sae: str
    weights: str
    """SHA-256 of its weights."""
    hook_point: str
    run: str
    model: str
    coded: Coded
    vocabulary: Vocabulary
    latents: pd.DataFrame
    """A row for each latent: `latent`, `label` (heuristic), `rate`, `mean`, `most`, `texts`, `f1`, `precision`,
    `recall`, `detection`, `fuzzing`, each score's `_shuffled`, `windows`, `cluster`."""
    rules: labels.Rules
    rates: pd.DataFrame
    """`latent`, `axis` (`token`, `phase`, `segment`, `position`), `class`, `rate`."""
    near: pd.DataFrame
    """`latent`, `by` (`decoder`, `firing`), `neighbour`, `value`."""
    promoted: Promoted | None
    examples: pd.DataFrame
    """`latent`, `bin` (`top`, or `1` to `4`, the weakest quarter first), `rid`, `position`, `flat`, `activation`,
    `row` (`computed`; a row that others were served from is counted in `reused`), `reused`."""
    null: pd.DataFrame
    """Scores of random directions that fire as often: `latent` (whose rate it has), `f1`, `detection`, `fuzzing`."""
    notes: Sequence[str] = field(default_factory=list)

    @property
    def scores(self) -> pd.DataFrame:
        """Means of each score over latents, beside its nulls: `score`, `labels`, `other_latents`,
        `random_directions`, `latents`."""
        found = []
        for name in ("detection", "fuzzing"):
            own = self.latents[[name, f"{name}_shuffled"]].dropna()
            found.append(
                {
                    "score": name,
                    "labels": own[name].mean(),
                    "other_latents": own[f"{name}_shuffled"].mean(),
                    "random_directions": self.null[name].mean(),
                    "latents": len(own),
                }
            )
        return pd.DataFrame(found)

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        alive = self.latents["rate"] > 0
        return {
            "sae": self.sae,
            "weights_sha256": self.weights,
            "hook_point": self.hook_point,
            "run": self.run,
            "model": self.model,
            "rows": len(self.coded),
            "texts": len(self.coded.rids),
            "left_out": self.coded.left_out,
            "latents": len(self.latents),
            "alive": int(alive.sum()),
            "named_by_few_tokens": int((self.latents["f1"] >= 0.5).sum()),
            "clusters": int(self.latents["cluster"].max() + 1),
            "scores": self.scores.to_dict("records"),
            "labels": "heuristic: the token-set rule, no model",
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Every table."""
        return {
            "latents": self.latents,
            "rates": self.rates,
            "neighbours": self.near,
            "examples": self.examples.drop(columns="flat"),
            "scores": self.scores,
            "random_directions": self.null,
        }


def study(
    path: Path,
    folder: Path,
    *,
    hook_point: str | None = None,
    model: Path | None = None,
    where: str | None = None,
    sinks: Sinks | None = None,
    most: int = 200_000,
    per_bin: int = 5,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> FeaturesResult:
    """Look at every latent.

    Args:
        folder: of the SAE.
        most: rows to read, whole texts drawn at random.
        per_bin: examples of each quarter of the activations.

    Raises:
        ConfigError: the SAE or checkpoint cannot be read or is of other weights than the run; no rows are left.
        RunDirectoryError: the run cannot be read, or lacks the hook point.
    """
    run, sae = load_run(path), read_sae(folder, hook_point=hook_point)
    refuse_other_model(sae, [run], str(folder))
    checkpoint = checkpoint_of(run, model)
    vocabulary = Vocabulary.load(checkpoint)
    coded = code_run(run, sae, where=where, sinks=sinks, most=most, seed=seed, tell=tell)
    if not coded.codes.nnz:
        raise ConfigError(f"no latent of {folder} fires in the {len(coded)} rows", fix="are they of its hook point?")
    fires = coded.codes.copy()
    fires.data = np.ones_like(fires.data)
    notes = []
    try:
        promoted = promote(sae, checkpoint)
    except ProbeError as e:
        promoted = None
        notes.append(f"tokens that latents promote are missing: {e}")
    first = labels.halves(len(coded.rids), seed)
    finds = first[coded.text[coded.rows["flat"].to_numpy()]]
    tokens = coded.rows["token_id"].to_numpy()
    rules = labels.token_rules(fires[np.flatnonzero(finds)], tokens[finds])
    scores = labels.score(coded, fires, rules, ~first, seed=seed)
    if len(coded.rids) < 2:
        notes.append("there is one text: labels were found, and nothing is left to judge them by")
    latents = _latents(coded, fires, rules, scores, vocabulary, promoted)
    latents["cluster"] = neighbours.clusters(fires)
    near = _near(sae, fires)
    examples = _examples(coded, per_bin, seed)
    null = random_null(run, sae, coded, latents, first, seed)
    return FeaturesResult(
        folder.name,
        weights_sha256(folder),
        str(sae.hook_point),
        run.path.name,
        str((run.manifest.get("model") or {}).get("name") or checkpoint.name),
        coded,
        vocabulary,
        latents,
        rules,
        _rates(coded, fires, vocabulary),
        near,
        promoted,
        examples,
        null,
        notes,
    )


def promote(sae: SAE, checkpoint: Path, k: int = PROMOTED) -> Promoted:
    """The direct logit attribution of every decoder row: `(W_dec * gain of the final norm) @ unembedding`.

    Raises:
        ProbeError: the final norm of this architecture was not reviewed.
    """
    head = load_unembedding(checkpoint)
    parts = []
    with torch.inference_mode():
        for block in sae.W_dec.float().split(_BLOCK):  # type: ignore[no-untyped-call]
            logits = (block * head.norm_M) @ head.weight_VM.T
            top, low = logits.topk(k, dim=-1), logits.topk(k, dim=-1, largest=False)
            parts.append((top.indices, top.values, low.indices, low.values))
    return Promoted(*(torch.cat(p).numpy() for p in zip(*parts, strict=True)))


def _latents(
    coded: Coded,
    fires: Any,
    rules: labels.Rules,
    scores: labels.Scores,
    vocabulary: Vocabulary,
    promoted: Promoted | None,
) -> pd.DataFrame:
    fired = np.asarray(fires.sum(0)).ravel()
    total = np.asarray(coded.codes.sum(0)).ravel()
    text = coded.text[coded.rows["flat"].to_numpy()]
    columns = fires.tocsc()
    texts = [
        len(np.unique(text[columns.indices[a:b]])) for a, b in zip(columns.indptr, columns.indptr[1:], strict=False)
    ]
    names = []
    for m, tokens in enumerate(rules.tokens):
        raised = [] if promoted is None else [visible(vocabulary.text(t)) for t in promoted.top[m]]
        said = labels.name_of([visible(vocabulary.text(t)) for t in tokens], float(np.nan_to_num(rules.f1[m])), raised)
        names.append(said if fired[m] else "never fires here")
    return pd.DataFrame(
        {
            "latent": np.arange(len(fired)),
            "label": names,
            "rate": fired / len(coded),
            "mean": np.where(fired > 0, total / np.maximum(fired, 1), np.nan),
            "most": np.asarray(coded.codes.max(axis=0).toarray()).ravel(),
            "texts": texts,
            "f1": rules.f1,
            "precision": rules.precision,
            "recall": rules.recall,
            "detection": scores.detection,
            "detection_shuffled": scores.detection_shuffled,
            "fuzzing": scores.fuzzing,
            "fuzzing_shuffled": scores.fuzzing_shuffled,
            "windows": scores.windows,
        }
    )


def _rates(coded: Coded, fires: Any, vocabulary: Vocabulary) -> pd.DataFrame:
    """How often each latent fires in each class of rows."""
    from scipy import sparse

    rows = coded.rows
    known, code = np.unique(rows["token_id"].to_numpy(), return_inverse=True)
    size = len(vocabulary)
    kinds = np.array(
        [
            kind_of(vocabulary.pieces[t], special=bool(vocabulary.special[t]), fallback=bool(vocabulary.fallback[t]))
            if 0 <= t < size
            else "unknown"
            for t in known
        ]
    )
    bins = bins_of(rows["position"].to_numpy())
    ends = rows["position"].groupby(bins).agg(["min", "max"])
    names = {b: f"{low} to {high}" for b, low, high in ends.itertuples(name=None)}
    axes = {
        "token": kinds[code],
        "phase": rows["phase"].astype(str).to_numpy(),
        "segment": rows["segment"].astype(str).to_numpy(),
        "position": np.array([names[b] for b in bins]),
    }
    found = []
    alive = np.flatnonzero(np.asarray(fires.sum(0)).ravel() > 0)
    for axis, values in axes.items():
        classes = list(dict.fromkeys(values[np.argsort(bins, kind="stable")])) if axis == "position" else None
        codes, classes = pd.factorize(values) if classes is None else (pd.Index(classes).get_indexer(values), classes)
        ones = np.ones(len(codes), np.float32)
        member = sparse.csr_array((ones, (codes, np.arange(len(codes)))), shape=(len(classes), len(codes)))
        counts = (member @ fires)[:, alive].toarray() / np.bincount(codes, minlength=len(classes))[:, None]
        part = pd.DataFrame(counts.T, columns=list(classes))
        part.insert(0, "latent", alive)
        found.append(part.melt("latent", var_name="class", value_name="rate").assign(axis=axis))
    return pd.concat(found, ignore_index=True)[["latent", "axis", "class", "rate"]]


def _near(sae: SAE, fires: Any) -> pd.DataFrame:
    alive = np.asarray(fires.sum(0)).ravel() > 0
    found = []
    given = {"decoder": neighbours.by_decoder(sae.W_dec.float().numpy(), alive), "firing": neighbours.by_firing(fires)}
    for name, near in given.items():
        m, k = np.nonzero(near.latent >= 0)
        frame = {"latent": m, "by": name, "neighbour": near.latent[m, k], "value": near.value[m, k]}
        found.append(pd.DataFrame(frame))
    return pd.concat(found, ignore_index=True)


def _examples(coded: Coded, per_bin: int, seed: int) -> pd.DataFrame:
    """The strongest rows of each latent, one of a text while there are others, and some of each quarter."""
    columns = coded.codes.tocsc()
    flat = coded.rows["flat"].to_numpy()
    text = coded.text[flat]
    rng = np.random.default_rng([seed, 3])
    parts: list[tuple[Array, Array, list[str]]] = []
    for m in range(columns.shape[1]):
        rows, values = (x[columns.indptr[m] : columns.indptr[m + 1]] for x in (columns.indices, columns.data))
        if not len(rows):
            continue
        order = np.argsort(-values, kind="stable")
        rank = pd.Series(text[rows[order]]).groupby(text[rows[order]]).cumcount().to_numpy()
        tops = order[np.argsort(rank, kind="stable")[:TOPS]]
        chosen, names = [tops[np.argsort(-values[tops], kind="stable")]], ["top"] * len(tops)
        quarters = np.array_split(order[::-1], BINS)
        for b, quarter in enumerate(quarters, start=1):
            drawn = rng.permutation(quarter)[:per_bin]
            chosen.append(drawn)
            names += [str(b)] * len(drawn)
        at = np.concatenate(chosen)
        parts.append((np.full(len(at), m), rows[at], names))
    latent = np.concatenate([p[0] for p in parts])
    row = np.concatenate([p[1] for p in parts])
    rows = coded.rows.iloc[row]
    return pd.DataFrame(
        {
            "latent": latent,
            "bin": [n for p in parts for n in p[2]],
            "rid": rows["rid"].to_numpy(),
            "position": rows["position"].to_numpy(),
            "flat": rows["flat"].to_numpy(),
            "activation": np.asarray(coded.codes[row, latent]).ravel(),
            "row": "computed",
            "reused": rows["reused"].to_numpy(),
        }
    )


def random_null(run: Run, sae: SAE, coded: Coded, latents: pd.DataFrame, first: Array, seed: int) -> pd.DataFrame:
    """Token-set labels of random directions that fire as often as some of the latents, and their scores."""
    rng = np.random.default_rng([seed, 4])
    scored = latents.loc[latents["detection"].notna(), "latent"].to_numpy(copy=True)
    chosen = np.sort(rng.permutation(scored)[:NULL_LATENTS])
    names = ["latent", "f1", "detection", "fuzzing"]
    if not len(chosen):
        return pd.DataFrame(columns=names)
    at = np.sort(rng.permutation(len(coded))[:NULL_ROWS]) if len(coded) > NULL_ROWS else np.arange(len(coded))
    x = run.rows(str(sae.hook_point), coded.rows["row"].to_numpy()[at]).float().numpy()
    fires = labels.random_directions(x, latents["rate"].to_numpy()[chosen], seed=seed)
    part = Coded(
        coded.rows.iloc[at].reset_index(drop=True),
        fires,
        coded.norms[at],
        coded.ids,
        coded.text,
        coded.rids,
        coded.position,
        coded.row_of,
        coded.gathered,
        {},
    )
    finds = first[part.text[part.rows["flat"].to_numpy()]]
    tokens = part.rows["token_id"].to_numpy()
    rules = labels.token_rules(fires[np.flatnonzero(finds)], tokens[finds])
    found = labels.score(part, fires, rules, ~first, seed=seed)
    return pd.DataFrame(dict(zip(names, (chosen, rules.f1, found.detection, found.fuzzing), strict=True)))
