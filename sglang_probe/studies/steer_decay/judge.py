"""A judge of what each arm wrote by itself, through any OpenAI-compatible endpoint. Never needed.

Two questions a text, each answered by 0, 1 or 2, as in AxBench (Wu et al. 2025, arXiv:2501.17148): how much it is about
the concept, and how fluent it is. The score of a text is the harmonic mean of the two, so that what is one and not the
other has none. The judge is not told which arm wrote a text. Its answers are an opinion: the plain model's text and
that of the random arm are judged beside, and differences are shown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.run.run import Run
from sglang_probe.stats.intervals import mean_intervals
from sglang_probe.studies.steer_decay.config import SteerDecayConfig
from sglang_probe.studies.steer_decay.names import PLAIN, named, rid_of
from sglang_probe.studies.steer_decay.statistics import RANDOM, VECTOR
from sglang_probe.workload.request import asked_rid

Messages = list[dict[str, str]]
Ask = Callable[[Sequence[Messages]], list[str]]
MEASURES = ("concept", "fluency", "score")
BEFORE = 40
"""Tokens before the window that the judge sees, marked as what came before."""
_QUESTIONS = {
    "concept": "How much is the continuation about this: {concept}? 0: not at all, 1: somewhat, 2: clearly.",
    "fluency": "How fluent is the continuation, as text or code of its kind? 0: not at all, 1: somewhat, 2: fluent.",
}
_FORM = (
    "Here is the end of a text, and how it was continued.\n\nBefore:\n{before}\n\nContinuation:\n{text}\n\n{question} "
    "Answer with the number alone."
)


def prompts_sha256() -> str:
    """Of the questions, so that a result says what was asked."""
    return hashlib.sha256("\n".join([_FORM, *_QUESTIONS.values()]).encode()).hexdigest()


def judged(run: Run, config: SteerDecayConfig, ask: Ask) -> pd.DataFrame:
    """What the judge says of each arm's text in its window, over the plain model's in the same steps.

    Args:
        run: `names.FREE`. ask: answers to questions, in their order.

    Returns:
        `arm, onset`, and each of `MEASURES` with its interval (`<m>_low`, `<m>_high`) and the plain model's
        in the same texts (`plain_<m>`), of so many texts (`<m>_texts`: those of which both answers were read);
        `asked`: answers about these texts and the plain model's; `unread`: those that held no number from 0 to 2, or
        several.
    """
    assert config.concept is not None
    vocabulary = Vocabulary.load(Path(run.manifest["model_path"]))
    requests = {asked_rid(r.rid): r for r in run.requests().itertuples()}
    wanted: list[tuple[str, int]] = []
    for rid in requests:
        text, source, arm, onset = named(rid)
        if arm != PLAIN:
            wanted += [(rid, onset), (rid_of(text, source, PLAIN, 0), onset)]
    wanted = list(dict.fromkeys(wanted))
    asked = []
    for rid, onset in wanted:
        ids = [*requests[rid].prompt_ids, *requests[rid].output_ids]
        # Step s predicts output s: the window's first token is at this position.
        start = len(requests[rid].prompt_ids) + onset
        cuts = (ids[max(0, start - BEFORE) : start], ids[start : start + config.window])
        before, text = (_words(vocabulary, cut) for cut in cuts)
        for question in _QUESTIONS.values():
            told = _FORM.format(before=before, text=text, question=question.format(concept=config.concept))
            asked.append([{"role": "user", "content": told}])
    answers = [number_of(a) for a in ask(asked)]
    marks = {place: _marks(answers[2 * i], answers[2 * i + 1]) for i, place in enumerate(wanted)}
    return _table(requests, marks, config)


def number_of(answer: str) -> float:
    """The mark in an answer, NaN if it holds none or several."""
    found = set(re.findall(r"(?<![\d.])[012](?![\d.]\d|\d)", answer))
    return float(found.pop()) if len(found) == 1 else float("nan")


def _words(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    return b"".join(vocabulary.pieces[i] for i in ids).decode(errors="replace")


def _marks(concept: float, fluency: float) -> tuple[float, float, float]:
    total = concept + fluency
    return concept, fluency, 2 * concept * fluency / total if total else total


def _table(
    requests: dict[str, Any], marks: Mapping[tuple[str, int], Sequence[float]], config: SteerDecayConfig
) -> pd.DataFrame:
    rows = []
    for rid, r in requests.items():
        text, source, arm, onset = named(rid)
        if arm != PLAIN:
            mine, plain = (np.array(marks[(x, onset)]) for x in (rid, rid_of(text, source, PLAIN, 0)))
            kind = VECTOR if arm == config.vector else RANDOM
            over = mine - plain
            unread = int(np.isnan([mine[:2], plain[:2]]).sum())
            rows.append((r.family, kind, onset, *over, *np.where(np.isnan(over), np.nan, plain), unread))
    names = [*MEASURES, *(f"plain_{m}" for m in MEASURES)]
    frame = pd.DataFrame(rows, columns=["family", "arm", "onset", *names, "unread"])
    found = []
    for (arm, onset), some in frame.groupby(["arm", "onset"], sort=False):
        by = some.groupby("family")[names].mean()
        ends = mean_intervals(by[list(MEASURES)].to_numpy(np.float64))
        row: dict[str, Any] = {"arm": arm, "onset": onset}
        row |= {"asked": 2 * len(_QUESTIONS) * len(some), "unread": int(some["unread"].sum())}
        for j, name in enumerate(MEASURES):
            row |= {name: ends.estimate[j], f"{name}_low": ends.low[j], f"{name}_high": ends.high[j]}
            row[f"plain_{name}"] = float(by[f"plain_{name}"].mean())
            row[f"{name}_texts"] = int(some[name].notna().sum())
        found.append(row)
    return pd.DataFrame(found)
