"""Where the steps of each request are, beside the same steps of the plain model, and what both predict there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.likelihood import Unembedding
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.studies.steer_dose.names import PLAIN, Place
from sglang_probe.workload.request import asked_rid

Array = np.ndarray[Any, Any]
_BLOCK = 256


def places(run: Run, steps: int) -> pd.DataFrame:
    """Every measured step of every request: `text, scope, arm, what, dose, family, step, token` (that follows in the
    text), `row` and `plain` (row of the same step of the plain model).

    A prompt may have a prefix, so steps are counted from the end of the prompt: step 1 is the row of the first
    generated token.

    Raises:
        ProbeError: a step has no row.
    """
    requests = run.requests()
    asked = requests["rid"].map(asked_rid)
    told = pd.DataFrame([vars(Place.of(rid)) for rid in asked])
    told = told.assign(rid=asked.to_numpy(), family=requests["family"].to_numpy(), end=requests["prompt_len"])
    outputs = pd.DataFrame(
        [
            (rid, step, int(ids[step]))
            for rid, ids in zip(asked, requests["output_ids"], strict=True)
            for step in range(1, min(steps + 1, len(ids)))
        ],
        columns=["rid", "step", "token"],
    )
    tokens = run.tokens()
    tokens = tokens[tokens["phase"] != schema.OVERSHOOT]
    tokens = tokens.assign(rid=tokens["rid"].map(asked_rid))[["rid", "position", "row"]].merge(told, on="rid")
    tokens["step"] = tokens["position"] - tokens["end"] + 1
    found = tokens[tokens["step"].between(1, steps)].merge(outputs, on=["rid", "step"])
    plain = found[found["arm"] == PLAIN].rename(columns={"row": "plain"})[["scope", "text", "step", "plain"]]
    found = found.merge(plain, on=["scope", "text", "step"])
    if not len(found) or (found[["row", "plain"]] < 0).any(axis=None):
        raise ProbeError(f"{run.path} has a step without a row", fix="record it again with --overwrite")
    names = ["text", "scope", "arm", "what", "dose", "family", "step", "token", "row", "plain"]
    order = ["scope", "arm", "what", "dose", "text", "step"]
    return found[names].sort_values(order, ignore_index=True)


def predictions(
    run: Run, at: pd.DataFrame, unembedding: Unembedding
) -> Iterator[tuple[torch.Tensor, torch.Tensor, pd.DataFrame]]:
    """Log-probabilities `[n, V]` of the plain model and of each step of `at`, float32, block by block, and which."""
    point = run.hook_points[-1]
    for start in range(0, len(at), _BLOCK):
        some = at.iloc[start : start + _BLOCK]
        plain, other = (
            torch.log_softmax(unembedding.logits(run.rows(point, some[k].to_numpy())), -1) for k in ("plain", "row")
        )
        yield plain, other, some


def measured(run: Run, at: pd.DataFrame, unembedding: Unembedding, positive: list[int], negative: list[int]) -> Any:
    """`at` with `kl` (from the plain prediction), `shift` (of the target's log-odds) and `nll` (rise of the negative
    log-likelihood of the token that follows), nats."""
    from sglang_probe.studies.steer_decay.target import log_odds

    parts: list[Array] = []
    for p, q, some in predictions(run, at, unembedding):
        kl = (p.exp() * (p - q)).sum(-1)
        shift = log_odds(q, positive, negative) - log_odds(p, positive, negative)
        token = torch.from_numpy(some["token"].to_numpy(np.int64))[:, None]
        nll = (p.gather(-1, token) - q.gather(-1, token))[:, 0]
        parts.append(torch.stack([kl, shift, nll], dim=1).double().numpy())
    found = np.concatenate(parts)
    return at.assign(**{name: found[:, j] for j, name in enumerate(("kl", "shift", "nll"))})


def repetition(ids: Array) -> tuple[float, float]:
    """Of a text its distinct pairs as a share of all pairs (distinct-2: Li et al. 2016), and the share of its 8-grams
    that it has had before."""
    return _distinct(ids, 2), 1 - _distinct(ids, 8)


def _distinct(ids: Array, n: int) -> float:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")
