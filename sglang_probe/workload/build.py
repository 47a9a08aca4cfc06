"""From a workload's configuration to its requests: `build_requests`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sglang_probe.errors import ProbeError, WorkloadError
from sglang_probe.workload.answers import Answers
from sglang_probe.workload.documents import Documents
from sglang_probe.workload.jsonl import Jsonl
from sglang_probe.workload.render import Renderer
from sglang_probe.workload.rendering import Rendering
from sglang_probe.workload.request import Conversation, Request, Truth
from sglang_probe.workload.retrieval import Retrieval
from sglang_probe.workload.shared_prefix import SharedPrefix
from sglang_probe.workload.sharegpt import ShareGpt
from sglang_probe.workload.sources import SourceReport, in_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WorkloadConfig = Annotated[
    SharedPrefix | Documents | Answers | Retrieval | Jsonl | ShareGpt, Field(discriminator="source")
]

# SGLang 0.5.23, srt/sampling/sampling_params.py: what it generates when a request does not say.
_DEFAULT_NEW_TOKENS = 128
# SGLang 0.5.23 never fills the context: it silently shortens an output that would (`Scheduler.init_req_max_new_tokens`)
# and refuses a prompt that leaves less room than this (`TpModelWorker`: `max_req_input_len`).
_UNUSED_POSITIONS = 2
_LEAST_ROOM = 5


@dataclass(frozen=True)
class Workload:
    """Requests, and what is recorded about where they came from."""

    requests: tuple[Request, ...]
    corpus_digest: str | None = None
    source: Mapping[str, Any] = field(default_factory=lambda: {"source": "requests"})
    """Its configuration; `requests`: they were made in code."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Of the skipped ones, how many for which reason."""
    examples: Mapping[str, str] = field(default_factory=dict)
    """The first of each reason, with file and line."""
    made_from: Mapping[str, Any] = field(default_factory=dict)
    """What made tokens of text: hashes of tokenizer and template, and how they were used."""

    @cached_property
    def digest(self) -> str:
        """`digest_of` its requests."""
        return digest_of(self.requests)

    @property
    def skipped(self) -> int:
        """How many records `skip_bad` passed over."""
        return sum(self.reasons.values())

    @property
    def skipped_in_words(self) -> str:
        """What was passed over and why; empty if nothing was."""
        if not self.skipped:
            return ""
        many = "1 record was" if self.skipped == 1 else f"{self.skipped} records were"
        return f"{many} skipped: {in_words(self.reasons)}"


def digest_of(requests: Iterable[Request]) -> str:
    """SHA-256 over prompt ids and sampling parameters in order: equal digests mean equal work."""
    h = hashlib.sha256()
    for r in requests:
        h.update(json.dumps([r.prompt_ids, r.sampling_params], sort_keys=True).encode() + b"\n")
    return h.hexdigest()


def build_requests(
    config: WorkloadConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None,
    default_sampling: Mapping[str, Any],
    check: Callable[[Request], None] = lambda _: None,
) -> Workload:
    """All requests of a workload.

    Args:
        check: raises ProbeError for a request that cannot be had; with `skip_bad` it is passed over and counted, like
            a malformed line.

    Raises:
        WorkloadError: the source cannot be read, a request cannot be rendered or does not fit into the context, or
            there is no request at all.
        ProbeError: of `check`; file and line come first.
    """
    report = SourceReport()
    limit = getattr(config, "limit", None)
    # Here, so that a request that is passed over does not count.
    unlimited = config if limit is None else config.model_copy(update={"limit": None})
    renderer = Renderer(tokenizer, config if isinstance(config, Rendering) else None)
    if isinstance(unlimited, Answers):  # its lengths and answers are counted in tokens
        told = unlimited.conversations(report, renderer)
    else:
        told = unlimited.conversations(report)
    made = _usable(told, renderer, report, check, context=context_length, sampling=default_sampling)
    requests = tuple(islice(made, limit))
    if not requests:
        examples = "".join(f"\n  {reason}: {said}" for reason, said in report.examples.items())
        raise WorkloadError(
            f"the workload has no requests: of {getattr(config, 'path', config.source)} no record can be used "
            f"({in_words(report.reasons)}). The first of each reason:{examples}"
            if report.skipped
            else f"the workload has no requests: {getattr(config, 'path', config.source)} holds none"
        )
    return Workload(
        requests,
        report.corpus_digest,
        config.model_dump(mode="json"),
        dict(report.reasons),
        dict(report.examples),
        renderer.made_from(),
    )


def iter_requests(
    conversations: Iterable[Conversation],
    renderer: Renderer,
    sampling: Mapping[str, Any],
) -> Iterator[Request]:
    """Render conversations one by one. A conversation's own sampling parameters overrule the default ones.

    Raises:
        WorkloadError: the first that cannot be used, with its place.
    """
    return _usable(conversations, renderer, SourceReport(), context=None, sampling=sampling)


def _usable(
    conversations: Iterable[Conversation],
    renderer: Renderer,
    report: SourceReport,
    check: Callable[[Request], None] = lambda _: None,
    *,
    context: int | None,
    sampling: Mapping[str, Any],
) -> Iterator[Request]:
    """Requests that can be served, numbered without gaps; the others go to the report."""
    number = 0
    for conversation in conversations:
        try:
            request = _request(number, conversation, renderer, context, sampling)
            check(request)
        except ProbeError as e:
            from_file = conversation.source is not None
            report.refuse(conversation.source or f"request {number}", e, from_file=from_file)
        else:
            number += 1
            yield request


def _request(
    number: int, conversation: Conversation, renderer: Renderer, context: int | None, default: Mapping[str, Any]
) -> Request:
    rendered = renderer.render(conversation)
    sampling = {**default, **conversation.sampling_params}
    _check_truth(rendered.prompt_ids, conversation.truth)
    check_fits(len(rendered.prompt_ids), sampling, context)
    return Request(
        number,
        f"r{number:06d}",
        rendered.prompt_ids,
        rendered.spans,
        conversation.family,
        sampling,
        rendered.labels,
        conversation.truth,
        conversation.source,
    )


def _check_truth(prompt_ids: tuple[int, ...], truth: Truth | None) -> None:
    if truth is not None and prompt_ids != truth.prompt_ids:
        raise WorkloadError(
            f"the tokenizer makes other tokens of a `{truth.task}` prompt than its answers refer to",
            fix="use `model: probe-recall`, whose vocabulary the source writes in",
        )


def new_tokens(sampling: Mapping[str, Any]) -> int:
    """Tokens that sampling parameters ask for; 0 for as many as fit.

    Raises:
        WorkloadError: it is no number.
    """
    new = sampling.get("max_new_tokens", _DEFAULT_NEW_TOKENS)
    if new is None:  # until the context is full
        return 0
    if not isinstance(new, int) or isinstance(new, bool) or new < 0:
        raise WorkloadError(
            f"`max_new_tokens` is {new!r}", fix="give a whole number that is not negative", reason="sampling value"
        )
    return new


def check_fits(prompt: int, sampling: Mapping[str, Any], context_length: int | None) -> None:
    """Refuse a prompt that leaves no room for its new tokens.

    Raises:
        WorkloadError: with the numbers.
    """
    new = new_tokens(sampling)
    if context_length is None:
        return
    usable = context_length - _UNUSED_POSITIONS
    if prompt + max(new, _LEAST_ROOM) > usable:
        raise WorkloadError(
            f"{prompt} prompt tokens and {new} new ones do not fit into the context of {context_length}, "
            f"of which SGLang uses {usable} (and wants room for {_LEAST_ROOM} new ones)",
            fix="shorten the prompt (for `shared_prefix`: fewer `exemplars`, `turns` or `document_chars`), "
            "lower `max_new_tokens`, or use a model with a longer context",
            reason="too long",
        )
