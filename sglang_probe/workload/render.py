"""From a `Conversation` to token ids in which every token knows which segment wrote it.

A chat template is a program, so what it does with a message is not guessed but observed: the conversation is rendered
a second time with a marker in place of every content (`chat.py`). The text around the markers is what the template
wrote; put together again with the contents it must reproduce the real rendering to the character, or the chat is
refused.

A token belongs to whoever wrote its first character that is not white space (its first character, if all are white
space). It is `special` if the tokenizer holds it special *and* the template or the tokenizer wrote it: a user's text
that spells `<|end|>` becomes that very token in most tokenizers, and is still the user's. The user's labels go by the
same rule: a token has those of its first character that is not white space.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from sglang_probe.errors import ConfigError, WorkloadError
from sglang_probe.workload.chat import ChatText, Written
from sglang_probe.workload.rendering import Rendering
from sglang_probe.workload.request import (
    SPECIAL,
    TEMPLATE,
    Conversation,
    LabelSpan,
    Rendered,
    Segment,
    SegmentSpan,
)
from sglang_probe.workload.sources import because

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Rendered", "Renderer"]

V = TypeVar("V")


class Renderer:
    """Renders conversations with one tokenizer.

    Args:
        options: how; a conversation may say otherwise of itself.

    Raises (on construction):
        WorkloadError: the tokenizer cannot say which characters a token came from.
        ConfigError: the chat template that `options` name cannot be read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Rendering | None = None) -> None:
        if not tokenizer.is_fast:
            raise WorkloadError(
                f"{type(tokenizer).__name__} cannot say which characters a token came from",
                fix="use a model with a fast tokenizer (a `tokenizer.json`), or give `prompt_ids`",
            )
        self._tokenizer = tokenizer
        self._options = options or Rendering()
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = added | set(tokenizer.all_special_ids)
        self._chat = ChatText(tokenizer, _template(self._options))
        if self._options.chat_template_kwargs:
            self._chat.check_variables(sorted(self._options.chat_template_kwargs))

    def made_from(self) -> dict[str, Any]:
        """What decides, beside the workload's records, which tokens a prompt has: for the manifest."""
        template = self._chat.template
        backend = self._tokenizer.backend_tokenizer.to_str()
        return {
            "tokenizer": type(self._tokenizer).__name__,
            "tokenizer_sha256": hashlib.sha256(backend.encode()).hexdigest(),
            "chat_template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
            **self._options.model_dump(mode="json", include=set(Rendering.model_fields)),
        }

    def text_of(self, ids: Sequence[int]) -> str:
        """The text that tokens stand for."""
        return str(self._tokenizer.decode(list(ids)))

    def render(self, conversation: Conversation) -> Rendered:
        """Tokenize a chat (every segment has a role) or a plain prompt (none has), and label every token.

        Raises:
            WorkloadError: the segments are inconsistent, the template fails or changes a content beyond recognition,
                or the prompt is empty. Its `reason` says which.
        """
        if conversation.rendered is not None:
            return conversation.rendered
        options = self._options.of(conversation.rendering)
        with because("bad value"):
            _check_segments(conversation.segments)
        # Cut at the borders of labels, and name each piece by its number: whoever writes a token has its labels too.
        segments, sources = _cut(conversation.segments)
        if all(s.role is None for s in segments):
            text, written = "".join(s.text for s in segments), [(len(s.text), s.name) for s in segments]
            encoding = self._encode_plain(text, options)
        else:
            with because("template"):
                text, written = self._chat.render(segments, options)
                encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                self._chat.check_ids(segments, options, encoding["input_ids"])
        ids: list[int] = encoding["input_ids"]
        if not text or not ids:  # some tokenizers make a lone BOS of no text
            raise WorkloadError("the prompt is empty", fix="give it at least one character", reason="empty prompt")
        runs = list(_runs(self._pieces(ids, encoding["offset_mapping"], text, written)))
        of = {n: sources[int(n)] if n.isdecimal() else _Source(n, ()) for n, _, _ in runs}
        spans = tuple(SegmentSpan(name, a, b) for name, a, b in _merged((of[n].name, a, b) for n, a, b in runs))
        return Rendered(tuple(ids), spans, tuple(_label_spans([(of[n].labels, a, b) for n, a, b in runs])))

    def _encode_plain(self, text: str, options: Rendering) -> Any:
        """A plain prompt's tokens. What the tokenizer puts before it is left out where the text has it already.

        SGLang's `/generate` does not look: it tokenizes as `add_special_tokens: true` does here.
        """
        add = options.add_special_tokens
        encoding = self._tokenizer(text, add_special_tokens=bool(add), return_offsets_mapping=True)
        if add == "auto":
            ids = encoding["input_ids"]
            before = sum(1 for _ in _leading(ids, encoding["offset_mapping"], self._special_ids))
            if before and ids[:before] == ids[before : 2 * before]:
                return self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoding

    def _pieces(
        self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str, written: Sequence[Written]
    ) -> list[str]:
        """Who wrote each token: a number of a piece, `template` or `special`."""
        ends = list(accumulate(length for length, _ in written))
        found = []
        at = 0
        specials = self._special_ids
        for token, (start, end) in zip(ids, offsets, strict=True):
            special = token in specials
            if start == end:
                if special:
                    found.append(SPECIAL)  # the tokenizer wrote it, e.g. BOS: no character stands for it
                    continue
                # Some tokenizers trim white space off the offsets (`trim_offsets`), all of it if there is nothing else.
                start = max(start - 1, 0)
            if text[start].isspace() and (bare := text[start:end].lstrip()):
                start = end - len(bare)
            if not (start < ends[at] and (at == 0 or ends[at - 1] <= start)):  # mostly it is who wrote the last token
                at = bisect_right(ends, start)
            owner = written[at][1]
            found.append(SPECIAL if special and owner == TEMPLATE else owner)
        return found


def _leading(ids: Sequence[int], offsets: Sequence[tuple[int, int]], special: set[int]) -> Iterator[int]:
    for token, (start, end) in zip(ids, offsets, strict=True):
        if start != end or token not in special:
            return
        yield token


def _template(options: Rendering) -> str | None:
    if options.chat_template is None:
        return None
    try:
        return options.chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        said = getattr(e, "strerror", None) or str(e)
        raise ConfigError(f"cannot read `chat_template` {options.chat_template}: {said}", fix="give a file") from e


@dataclass(frozen=True)
class _Source:
    """Where a piece of text comes from: its segment's name, and (axis, class) of the labels over it."""

    name: str
    labels: tuple[tuple[str, str], ...]


def _cut(segments: tuple[Segment, ...]) -> tuple[tuple[Segment, ...], list[_Source]]:
    pieces: list[Segment] = []
    sources: list[_Source] = []
    for s in segments:
        edges = sorted({0, len(s.text), *(e for label in s.labels for e in (label.start, label.end))})
        for a, b in pairwise(edges) if s.text else [(0, 0)]:
            over = tuple((label.axis, label.name) for label in s.labels if label.start <= a and b <= label.end)
            pieces.append(Segment(str(len(sources)), s.text[a:b], s.role, s.message))
            sources.append(_Source(s.name, over))
    return tuple(pieces), sources


def _check_segments(segments: tuple[Segment, ...]) -> None:
    if len({s.role is None for s in segments}) > 1:
        raise WorkloadError("some segments have a role and others have none", fix="give all of them roles, or none")
    for s in segments:
        if s.name in (TEMPLATE, SPECIAL):
            raise WorkloadError(f"`{s.name}` is not a segment's name: the renderer calls tokens that no segment wrote")
        try:
            s.text.encode()
        except UnicodeEncodeError as e:
            raise WorkloadError(
                f"segment `{s.name}` holds a lone surrogate (U+{ord(s.text[e.start]):04X}) at character {e.start}",
                fix="repair the text; a lone surrogate is not a character and has no tokens",
            ) from e
    for _, message in groupby((s for s in segments if s.role is not None), key=lambda s: s.message):
        given = list(message)
        if len({s.role for s in given}) > 1:
            raise WorkloadError(
                f"message {given[0].message} has segments of different roles", fix="number messages apart"
            )


def _runs(values: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Each value with the range in which it stands unchanged."""
    start = 0
    for value, group in groupby(values):
        end = start + len(list(group))
        yield value, start, end
        start = end


def _merged(runs: Iterable[tuple[V, int, int]]) -> Iterator[tuple[V, int, int]]:
    """Runs of which no two that touch have one value."""
    for value, group in groupby(runs, key=lambda r: r[0]):
        parts = list(group)
        yield value, parts[0][1], parts[-1][2]


def _label_spans(runs: list[tuple[tuple[tuple[str, str], ...], int, int]]) -> Iterator[LabelSpan]:
    """Where labels of one axis overlap, the first one given counts."""
    for axis in sorted({axis for found, _, _ in runs for axis, _ in found}):
        named = ((next((name for a, name in found if a == axis), None), a, b) for found, a, b in runs)
        yield from (LabelSpan(axis, name, a, b) for name, a, b in _merged(named) if name is not None)
