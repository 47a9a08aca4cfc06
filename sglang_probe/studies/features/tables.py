"""The tables of a dictionary's latents: what is known of each, where it fires, what is near it, and examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.axes.lexical import kind_of
from sglang_probe.axes.position import bins_of
from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.eviction.likelihood import load_unembedding
from sglang_probe.report.figures import visible
from sglang_probe.sae import labels, neighbours
from sglang_probe.sae.coded_run import Coded
from sglang_probe.sae.sae import SAE

Array = np.ndarray[Any, Any]
TOPS, BINS = 10, 4
PROMOTED = 8
_BLOCK = 256


@dataclass(frozen=True)
class Promoted:
    """Tokens whose logits a decoder row raises and lowers most; `[M, k]`."""

    top: Array
    top_value: Array
    bottom: Array
    bottom_value: Array


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


def latents_table(
    coded: Coded,
    fires: Any,
    rules: labels.Rules,
    scores: labels.Scores,
    vocabulary: Vocabulary,
    promoted: Promoted | None,
) -> pd.DataFrame:
    fired = np.asarray(fires.sum(0)).ravel()
    total = np.asarray(coded.codes.sum(0)).ravel()
    text = coded.text_of_row
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


def rates_table(coded: Coded, fires: Any, vocabulary: Vocabulary) -> pd.DataFrame:
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


def near_table(sae: SAE, fires: Any) -> pd.DataFrame:
    alive = np.asarray(fires.sum(0)).ravel() > 0
    found = []
    given = {"decoder": neighbours.by_decoder(sae.W_dec.float().numpy(), alive), "firing": neighbours.by_firing(fires)}
    for name, near in given.items():
        m, k = np.nonzero(near.latent >= 0)
        frame = {"latent": m, "by": name, "neighbour": near.latent[m, k], "value": near.value[m, k]}
        found.append(pd.DataFrame(frame))
    return pd.concat(found, ignore_index=True)


def examples_table(coded: Coded, per_bin: int, seed: int) -> pd.DataFrame:
    """The strongest rows of each latent, one of a text while there are others, and some of each quarter."""
    columns = coded.codes.tocsc()
    text = coded.text_of_row
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
            "run": rows["run"].to_numpy(),
            "rid": rows["rid"].to_numpy(),
            "position": rows["position"].to_numpy(),
            "flat": rows["flat"].to_numpy(),
            "activation": np.asarray(coded.codes[row, latent]).ravel(),
            "row": "computed",
            "reused": rows["reused"].to_numpy(),
        }
    )
