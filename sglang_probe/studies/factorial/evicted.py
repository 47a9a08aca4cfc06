"""What the model predicts after an eviction by a cell's pseudo queries: the outcome that all others stand for.

The tokens of the real decoding are forced, so that every cell predicts the same tokens after the same text. The first
of them comes from the prefill with the full cache, in every cell, and does not count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.eviction.likelihood import load_unembedding, output_logits, token_nll
from sglang_probe.run.run import Run
from sglang_probe.workload.request import asked_rid

FULL = "full"
BASELINE = "baseline"
NO_LAYER = -1
OUTCOMES = ("agreement", "nll")


def evicted_rid(rid: str, content: str, position: str) -> str:
    """Id of the request that decodes after an eviction; of baselines, content is `baseline`."""
    return f"{rid}.{content}.{position}"


def predictions(evicted: Run, decoded: Run, model: Path) -> pd.DataFrame:
    """Rows `rid, layer (NO_LAYER), content, position, outcome, value` per request and cell.

    `agreement` is the share of the forced tokens that the model would have chosen, `nll` their negative
    log-likelihood in nats per token beyond that with the full cache. Rows of the full cache have no excess.

    Raises:
        RunDirectoryError: the residual stream after the last layer was not captured.
    """
    unembedding = load_unembedding(model)
    rows: list[dict[str, Any]] = []
    full: dict[str, float] = {}
    for r in evicted.requests().itertuples():
        if "." not in r.rid:  # a prompt that fills the cache
            continue
        rid, content, position = asked_rid(r.rid).split(".")
        logits = output_logits(evicted, r.rid, unembedding)[1:]
        tokens = list(r.output_ids)[1:]
        nll = float(token_nll(logits, tokens).mean())
        agreement = float((logits.argmax(-1).numpy() == tokens).mean())
        if (content, position) == (BASELINE, FULL):
            full[rid] = nll
        cell = {"rid": rid, "layer": NO_LAYER, "content": content, "position": position}
        rows += [{**cell, "outcome": "agreement", "value": agreement}, {**cell, "outcome": "nll", "value": nll}]
    frame = pd.DataFrame(rows)
    excess = frame["outcome"] == "nll"
    frame.loc[excess, "value"] -= frame.loc[excess, "rid"].map(full)
    return frame[frame["rid"].isin(set(decoded.requests()["rid"].map(asked_rid)))]
