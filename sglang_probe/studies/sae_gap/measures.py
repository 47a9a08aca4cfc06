"""From rows to numbers: for every position of the continuation, error and entropy, and what replacing rows does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.likelihood import Unembedding
from sglang_probe.run.run import Run
from sglang_probe.run.tokens import PART, iter_positions
from sglang_probe.sae.evaluation import evaluate
from sglang_probe.sae.sae import SAE
from sglang_probe.studies.phase.rows import row_indices
from sglang_probe.studies.phase.study import DECODED

Array = np.ndarray[Any, Any]


def where_of(run: Run, start: int, end: int, *, intervened: bool) -> tuple[Array, Array]:
    """Texts and their rows, as `row_indices`.

    Raises:
        ProbeError: a position was not computed by the run itself, or is under an intervention although none was asked,
            or the other way round.
    """
    for _, tokens in iter_positions(run, run.requests_table(["rid"]).to_pandas(), PART):
        within = tokens[(tokens["position"] >= start) & (tokens["position"] < end)]
        marked = within["intervention"].notna()
        if not (marked.any() if not intervened else not marked.all()):
            continue
        raise ProbeError(f"{run.path} has positions that {'are' if not intervened else 'are not'} intervened on")
    return row_indices(run, start, end)


def token_ids(run: Run, kind: str, start: int, end: int) -> Array:
    """Token ids of the continuation, `[texts, positions]`, in the order of `row_indices`."""
    requests = run.requests().sort_values("index")
    if kind == DECODED:
        ids = [list(o)[: end - start] for o in requests["output_ids"]]
    else:
        ids = [list(p)[start:end] for p in requests["prompt_ids"]]
    return np.array(ids, dtype=np.int64)


def reconstruction(sae: SAE, run: Run, where_TC: Array) -> pd.DataFrame:
    """By row, in the order of the texts: `error`, `squared_norm`, `active`."""
    assert sae.hook_point is not None
    return evaluate(sae, run.rows(sae.hook_point, where_TC.ravel()).float()).rows


def predictions(
    clean: Run, where_TC: Array, ids_TC: Array, variants: Mapping[str, tuple[Run, Array]], unembedding: Unembedding
) -> pd.DataFrame:
    """By row: `entropy` (nats) and `nll` of the token that follows; and for each variant its `nll_<variant>` and
    `kl_<variant>`, the divergence of its prediction from the clean one. The last row of a text has no `nll`.

    Args:
        variants: runs of the same tokens whose rows were replaced, with where their rows are.
    """
    last = f"blocks.{int(clean.manifest['model_config']['num_hidden_layers']) - 1}.hook_resid_post"
    frames = []
    for t, rows in enumerate(where_TC):
        following = torch.from_numpy(np.append(ids_TC[t, 1:], 0))[:, None]

        def told(run: Run, rows: Array) -> torch.Tensor:
            return torch.log_softmax(unembedding.logits(run.rows(last, rows)), -1)

        logp = told(clean, rows)
        p = logp.exp()
        columns = {"entropy": -(p * logp).sum(-1).clamp(max=0), "nll": -logp.gather(1, following)[:, 0]}
        for name, (run, there_TC) in variants.items():
            logq = told(run, there_TC[t])
            columns[f"nll_{name}"] = -logq.gather(1, following)[:, 0]
            columns[f"kl_{name}"] = (p * (logp - logq)).sum(-1)
        frame = pd.DataFrame({n: c.double().numpy() for n, c in columns.items()})
        frame.loc[len(frame) - 1, [c for c in frame if c.startswith("nll")]] = np.nan
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def repetition(ids_C: Array, n: int) -> float:
    """Share of the n-grams of a text that occurred in it before."""
    grams = np.lib.stride_tricks.sliding_window_view(ids_C, n) if len(ids_C) >= n else np.empty((0, n))
    return 1 - len(np.unique(grams, axis=0)) / len(grams) if len(grams) else 0.0
