"""The requests of an eviction study: what a task is judged by, and what is asked under kept sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from sglang_probe.ask import Ask
from sglang_probe.errors import ConfigError, WorkloadError
from sglang_probe.harvest.kept_requests import KeptRequest
from sglang_probe.studies.evict.config import Cut
from sglang_probe.studies.evict.lookahead_runs import DAPQ, Asked
from sglang_probe.workload.request import Request, SegmentSpan, Truth


def lookahead_request(asked: Asked, source: Request) -> KeptRequest:
    """A request that generates lookahead tokens under a kept set, or runs pseudo and draft tokens."""
    greedy = {"temperature": 0.0, "ignore_eos": True}
    prompt = source.prompt_ids[: asked.context]
    if asked.kept is None and asked.at[1] == DAPQ:
        return KeptRequest(asked.rid, (*prompt, *asked.pseudo), None, None, {**greedy, "max_new_tokens": 1})
    # The last token that is sampled has no query.
    new = {**greedy, "max_new_tokens": asked.steps + 1}
    return KeptRequest(asked.rid, prompt, None if asked.kept is None else asked.rid, asked.pseudo or None, new)


def kept_request(row: Any, source: Request) -> KeptRequest:
    """The request of a row of `asked_of`."""
    assert source.truth is not None
    own = {k: v for k, v in source.sampling_params.items() if k != "custom_params"}
    force = source.truth.continuation_ids if row.forced else source.ask.force
    own["temperature"] = row.temperature
    key = None if row.key is None or pd.isna(row.key) else str(row.key)
    return KeptRequest(row.rid, source.prompt_ids, key, force, own, family=source.rid)


def forced(request: Request) -> Request:
    """The request with its right output prescribed."""
    assert request.truth is not None
    ask = Ask(force=request.truth.continuation_ids)
    return replace(request, sampling_params=ask.into(request.sampling_params))


def with_truth(task: str, requests: Sequence[Request], cut: Cut | None) -> list[Request]:
    """The requests that can be judged.

    Raises:
        WorkloadError: some have right answers and some do not, or `cut` is missing or has no meaning.
    """
    known = [r for r in requests if r.truth is not None]
    if known and len(known) < len(requests):
        raise WorkloadError(f"task `{task}`: {len(known)} of {len(requests)} requests have right answers")
    if known:
        if len(known) < 2:
            raise WorkloadError(f"task `{task}`: 1 request; policies are compared over two or more")
        if any(len(r.truth.continuation_ids) < 2 for r in known if r.truth):
            raise WorkloadError(f"task `{task}`: one answer comes from prefill alone", fix="use two `answers` or more")
        return known
    if cut is None:
        raise ConfigError(
            f"task `{task}` has no right answers", fix="say by `cut` what is prompt, question and reference"
        )
    return list(_cut(requests, cut, task))


def _cut(requests: Iterable[Request], cut: Cut, task: str) -> Iterable[Request]:
    """Requests with tokens enough, cut to prompt and reference. Those that are too short are left out."""
    p, n = cut.prompt_tokens, 0
    for r in requests:
        if len(r.prompt_ids) < p + cut.steps:
            continue
        n += 1
        prompt, reference = r.prompt_ids[:p], r.prompt_ids[p : p + cut.steps]
        context = p - cut.question_tokens
        truth = Truth(
            task=task,
            prompt_ids=prompt,
            context_len=context,
            continuation_ids=reference,
            answer_ids=reference,
            answer_steps=tuple(range(cut.steps)),
            needed_content=(),
            needed_causal=None,
            depth=float("nan"),
        )
        spans = (SegmentSpan("context", 0, context), SegmentSpan("question", context, p))
        yield replace(r, prompt_ids=prompt, spans=spans, labels=(), truth=truth)
    if n < 2:
        raise WorkloadError(
            f"task `{task}`: {n} texts have {p + cut.steps} tokens", fix="longer texts, or a shorter cut"
        )
