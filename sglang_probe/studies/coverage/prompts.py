"""Coverage: which share of the prompt positions in traffic a harvest computed, by class and by position."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.run import schema
from sglang_probe.run.run import Run

GENERATED = "generated"


def coverage_by_segment(tokens: pd.DataFrame) -> pd.DataFrame:
    """Coverage of each segment class of the prompts.

    Args:
        tokens: `Run.tokens()`.

    Returns:
        One row per class, in order of first appearance: segment, positions, computed, reused, coverage (computed
        share of positions). A last row `all` sums the prompts.
    """
    prompt = tokens[tokens["segment"] != GENERATED]
    order = list(dict.fromkeys(prompt["segment"]))
    # A workload may have a class of the name that the sum has.
    names = {s: "all (segment)" if s == "all" else s for s in order}
    rows = [_counts(prompt[prompt["segment"] == s], segment=names[s]) for s in order]
    return pd.DataFrame([*rows, _counts(prompt, segment="all")])


def coverage_by_position(tokens: pd.DataFrame, *, width: int = 32) -> pd.DataFrame:
    """Coverage of prompt positions in bins of `width`: columns start, end, positions, computed, reused, coverage."""
    prompt = tokens[tokens["segment"] != GENERATED]
    starts = (prompt["position"] // width * width).to_numpy()
    rows = [{"start": int(s), "end": int(s) + width, **_counts(prompt[starts == s])} for s in np.unique(starts)]
    return pd.DataFrame(rows, columns=["start", "end", "positions", "computed", "reused", "coverage"])


def totals(run: Run, tokens: pd.DataFrame) -> dict[str, float]:
    """Token counts and speed of one run.

    Keys: requests, prompt_tokens, computed, reused, generated (sampled tokens), decode_steps (positions computed in
    decode), overshoot, recomputed, sglang_cached_tokens, requests_reconciled, seconds, tokens_per_second (prompt and
    generated tokens over wall time, engine start not included).
    """
    requests = run.requests()
    spans = run.spans()
    spans = spans[spans["rid"].isin(requests["rid"])]
    length = spans["end"] - spans["start"]
    reused = spans[(spans["status"] == schema.REUSED) & (spans["attempt"] == 0)]
    per_request = (reused["end"] - reused["start"]).groupby(reused["rid"]).sum()
    ours = requests["rid"].map(per_request).fillna(0)
    starts = schema.starts_of(run.manifest)
    # An engine that was killed left no duration: speed is unknown then.
    timed = all(s["seconds"] is not None for s in starts)
    seconds = sum(s["seconds"] for s in starts) if timed else float("nan")
    prompt, generated = int(requests["prompt_len"].sum()), int(requests["output_len"].sum())

    def of(column: str, value: str) -> int:
        return int(length[spans[column] == value].sum())

    return {
        "requests": len(requests),
        "prompt_tokens": prompt,
        "computed": of("phase", schema.PREFILL),
        "reused": of("status", schema.REUSED),
        "recomputed": of("phase", schema.RECOMPUTE),
        "generated": generated,
        "decode_steps": of("phase", schema.DECODE),
        "overshoot": of("phase", schema.OVERSHOOT),
        "sglang_cached_tokens": int(requests["cached_tokens"].fillna(0).sum()),
        "requests_reconciled": int((ours == requests["cached_tokens"]).sum()),
        "seconds": seconds,
        "tokens_per_second": (prompt + generated) / seconds if seconds > 0 else float("nan"),
    }


def _counts(tokens: pd.DataFrame, **labels: str) -> dict[str, object]:
    computed = int((tokens["status"] == schema.COMPUTED).sum())
    reused = int((tokens["status"] == schema.REUSED).sum())
    return {
        **labels,
        "positions": len(tokens),
        "computed": computed,
        "reused": reused,
        "coverage": computed / len(tokens) if len(tokens) else float("nan"),
    }
