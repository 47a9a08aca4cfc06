"""What was generated under kept sets: right answers, whole answers, and where an output parts from the full cache's.

The first answer comes from prefill. Under the query-visible protocol no eviction can change it, so it is never part of
`accuracy` or `success`; where the question is read from the compressed cache it is reported alone (`first_answer`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

OUTCOMES: dict[str, str] = {
    "accuracy": "share of answers after the first that are right, generating freely",
    "success": "share of prompts of which all these answers are right",
    "first_answer": "share of first answers that are right; the query-visible protocol cannot change it",
    "agreement": "share of generated tokens that are those of the full cache at the same step",
    "divergence": "step at which the output first differs from the full cache's; the number of steps if it never does",
}

SHORT: dict[str, str] = {
    "accuracy": "accuracy",
    "success": "all answers right",
    "first_answer": "first answer right",
    "agreement": "agreement with the full cache",
    "divergence": "first different step",
    "nll": "loss, nats per token",
    "top1": "same most likely token",
    "answer_nll": "loss of the answers, nats per token",
    "kl": "KL divergence, nats per token",
}
"""Headers of tables, of likelihoods too."""

OF_ANSWERS = ("accuracy", "success", "first_answer", "answer_nll")
"""Outcomes that need right answers: the text of a person is not the only right continuation."""


def judge_outputs(
    asked: pd.DataFrame, outputs: pd.DataFrame, sources: pd.DataFrame, full: pd.DataFrame
) -> pd.DataFrame:
    """Outcomes of every request that was generated freely.

    Args:
        asked: rid, source, and what names its cell.
        outputs: `run.requests()` of the run that served them.
        sources: `run.requests()` of the full-cache run: answer_ids, answer_steps and task of each source.
        full: the outputs that agreement refers to, by source: rid and output_ids.

    Returns:
        `asked` with accuracy, success, first_answer, agreement, divergence and `truncated` (fewer tokens than the
        reference run has). Requests that were not served have NaN and `failed`.
    """
    produced = outputs.set_index("rid")["output_ids"]
    right = sources.set_index("rid")
    reference = full.set_index("rid")["output_ids"]
    rows: list[dict[str, float | bool]] = []
    for r in asked.itertuples():
        truth, wanted = right.loc[r.source], list(reference[r.source])
        if r.rid not in produced.index:
            rows.append({"failed": True, "truncated": False})
            continue
        found = list(produced[r.rid])
        rows.append({"failed": False, **compare(found, wanted, truth["answer_ids"], truth["answer_steps"])})
    return pd.concat([asked.reset_index(drop=True), pd.DataFrame(rows)], axis=1)


def compare(
    found: Sequence[int], wanted: Sequence[int], answers: Sequence[int], steps: Sequence[int]
) -> dict[str, float | bool]:
    """Outcomes of one output beside the full cache's and the right answers. A token that is missing is wrong."""
    out, full = np.asarray(found), np.asarray(wanted)
    short = len(out) < len(full)
    padded = np.full(max(len(full), int(max(steps)) + 1), -1, dtype=np.int64)
    padded[: min(len(out), len(padded))] = out[: len(padded)]
    right = padded[np.asarray(steps)] == np.asarray(answers)
    later = right[np.asarray(steps) > 0]
    same = padded[: len(full)] == full
    parted = np.flatnonzero(~same)
    return {
        "accuracy": float(later.mean()) if len(later) else float("nan"),
        "success": float(later.all()) if len(later) else float("nan"),
        "first_answer": float(right[0]) if steps[0] == 0 else float("nan"),
        # The first token comes from prefill here, too.
        "agreement": float(same[1:].mean()),
        "divergence": float(parted[0]) if len(parted) else float(len(full)),
        "truncated": short,
    }
