"""Coverage: which share of the prompt positions in traffic a harvest computed, by class and by position."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from sglang_probe.run import schema
from sglang_probe.run.run import Run

GENERATED = "generated"
Array = np.ndarray[Any, Any]
Frames: TypeAlias = pd.DataFrame | Iterable[pd.DataFrame]


def coverage_by_segment(tokens: Frames) -> pd.DataFrame:
    """Coverage of each segment class of the prompts: `PromptCoverage.by_segment`."""
    return PromptCoverage(tokens).by_segment()


def coverage_by_position(tokens: Frames, *, width: int = 32) -> pd.DataFrame:
    """Coverage of prompt positions in bins of `width`: `PromptCoverage.by_position`."""
    return PromptCoverage(tokens, width=width).by_position()


class PromptCoverage:
    """What became of the positions of prompts, counted in one pass.

    Args:
        tokens: `Run.tokens()`, or `Run.iter_tokens()`: some requests at a time.
        width: positions in a bin.
    """

    def __init__(self, tokens: Frames, *, width: int = 32) -> None:
        self._width = width
        self._segments: dict[str, Array] = {}
        """positions, computed, reused; int64 `[3]`."""
        self._bins: dict[int, Array] = {}
        for frame in [tokens] if isinstance(tokens, pd.DataFrame) else tokens:
            prompt = frame[frame["segment"] != GENERATED]
            status = prompt["status"]
            each = np.stack([np.ones(len(prompt), bool), status == schema.COMPUTED, status == schema.REUSED], axis=1)
            for keys, counted in ((prompt["segment"], self._segments), (prompt["position"] // width, self._bins)):
                codes, names = pd.factorize(keys)
                for i, name in enumerate(names):
                    counted[name] = counted.get(name, 0) + each[codes == i].sum(axis=0)

    def by_segment(self) -> pd.DataFrame:
        """One row per class, in order of first appearance: segment, positions, computed, reused, coverage (computed
        share of positions). A last row `all` sums the prompts."""
        # A workload may have a class of the name that the sum has.
        names = {s: "all (segment)" if s == "all" else s for s in self._segments}
        rows = [_counts(counted, segment=names[s]) for s, counted in self._segments.items()]
        return pd.DataFrame([*rows, _counts(sum(self._segments.values(), np.zeros(3, np.int64)), segment="all")])

    def by_position(self) -> pd.DataFrame:
        """One row per bin: start, end, positions, computed, reused, coverage."""
        starts = {int(b) * self._width: counted for b, counted in sorted(self._bins.items())}
        rows = [{"start": s, "end": s + self._width, **_counts(counted)} for s, counted in starts.items()]
        return pd.DataFrame(rows, columns=["start", "end", "positions", "computed", "reused", "coverage"])


def totals(run: Run) -> dict[str, float]:
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


def _counts(counted: Array, **labels: str) -> dict[str, object]:
    positions, computed, reused = map(int, counted)
    share = computed / positions if positions else float("nan")
    return {**labels, "positions": positions, "computed": computed, "reused": reused, "coverage": share}
