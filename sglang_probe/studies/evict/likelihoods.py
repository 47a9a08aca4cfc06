"""Likelihood of the reference under kept sets, from the last layer's captured rows of teacher-forced requests.

The row of position p predicts the token at p + 1. The first output token comes from prefill and is left out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sglang_probe.eviction.likelihood import Unembedding, load_unembedding
from sglang_probe.run.hook_points import RESID_POST
from sglang_probe.run.run import Run
from sglang_probe.run.schema import OVERSHOOT
from sglang_probe.studies.evict.asked import FULL_CACHE
from sglang_probe.studies.evict.layers import requests_of
from sglang_probe.workload.request import asked_rid

FORCED_OUTCOMES = {
    "nll": "mean negative log-likelihood of the reference after its first token, nats per token, teacher-forced",
    "top1": "share of steps at which the most likely token is that of the full cache, teacher-forced",
    "answer_nll": "the same likelihood of the answers alone",
    "kl": "KL(full cache ‖ kept set) of the next-token distribution, nats per token, teacher-forced",
}
_BLOCK = 8192


def forced_outcomes(asked: pd.DataFrame, run: Run, sources: pd.DataFrame) -> pd.DataFrame:
    """Outcomes of teacher-forced requests; `top1` and `kl` refer to the full cache in the same run.

    Args:
        asked: rid, source, policy, and what names its cell.
        run: what served them, with rows of the last layer.
        sources: `requests_of` the full-cache run: answer_steps of each source.
    """
    layers = int(run.manifest["model_config"]["num_hidden_layers"])
    unembedding = load_unembedding(Path(run.manifest["model_path"]))
    tokens = run.tokens()
    tokens["rid"] = tokens["rid"].map(asked_rid)
    tokens = tokens[tokens["phase"] != OVERSHOOT]
    requests = requests_of(run).set_index("rid")
    length = tokens["rid"].map(requests["prompt_len"])
    decoded = tokens[tokens["position"] >= length].sort_values(["rid", "position"])
    rows = run.rows(f"blocks.{layers - 1}.{RESID_POST}", decoded["row"].to_numpy())
    step = (decoded["position"] - length[decoded.index] + 1).to_numpy()
    outputs = requests["output_ids"]
    wanted = np.concatenate([outputs[rid][1:] for rid in dict.fromkeys(decoded["rid"])])
    frame = pd.DataFrame({"rid": decoded["rid"].to_numpy(), "step": step})
    named = frame.merge(asked[["rid", "source", "policy"]], on="rid", how="left")
    at = pd.MultiIndex.from_frame(named[["source", "step"]])
    full = np.flatnonzero((named["policy"] == FULL_CACHE).to_numpy())
    first = pd.Series(full, index=at[full])
    reference = first[~first.index.duplicated()].reindex(at).to_numpy()
    found = _judge(rows, torch.from_numpy(wanted.astype(np.int64)), torch.tensor(reference), unembedding)
    named = named.assign(**found)
    steps = sources.set_index("rid")["answer_steps"]
    answers = {(rid, int(s)) for rid, mine in steps.items() for s in mine}
    named["answers"] = [pair in answers for pair in zip(named["source"], named["step"], strict=True)]
    result = named.groupby("rid").agg(nll=("nll", "mean"), top1=("top1", "mean"), kl=("kl", "mean"))
    result["answer_nll"] = named[named["answers"]].groupby("rid")["nll"].mean()
    out = asked.merge(result.reset_index(), on="rid", how="left")
    return out.assign(failed=out["nll"].isna(), truncated=False)


def _judge(rows: Tensor, wanted: Tensor, reference: Tensor, unembedding: Unembedding) -> dict[str, np.ndarray]:
    """Per row: negative log-likelihood of the wanted token; and against the row `reference`, whether the most likely
    token is the same, and the divergence from its distribution."""
    parts = []
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, start + _BLOCK)
        logp = torch.log_softmax(unembedding.logits(rows[block]), -1)
        full = torch.log_softmax(unembedding.logits(rows[reference[block]]), -1)
        nll = -logp.gather(-1, wanted[block, None]).squeeze(-1)
        parts.append((nll, logp.argmax(-1) == full.argmax(-1), (full.exp() * (full - logp)).sum(-1)))
    return {name: torch.cat(x).numpy() for name, x in zip(("nll", "top1", "kl"), zip(*parts, strict=True), strict=True)}
