"""From a `Conversation` to token ids in which every token knows which segment wrote it.

A chat template is a program, so what it does with a message is not guessed but observed: the conversation is rendered
a second time with a marker in place of every content. The text around the markers is what the template wrote; put
together again with the contents it must reproduce the real rendering to the character, or the template is refused.

A token belongs to whoever wrote its first character that is not white space (its first character, if all are white
space). It is `special` if the tokenizer holds it special *and* the template or the tokenizer wrote it: a user's text
that spells `<|end|>` becomes that very token in most tokenizers, and is still the user's. The user's labels go by the
same rule: a token has those of its first character that is not white space.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from sglang_probe.errors import WorkloadError
from sglang_probe.workload.request import SPECIAL, TEMPLATE, Conversation, LabelSpan, Segment, SegmentSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters: no template writes them, strips them or changes their case.
_MARKER = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class Rendered:
    """A prompt as the engine receives it. `spans` tile `[0, len(prompt_ids))`; `labels` of one axis are disjoint."""

    prompt_ids: tuple[int, ...]
    spans: tuple[SegmentSpan, ...]
    labels: tuple[LabelSpan, ...] = ()


class Renderer:
    """Renders conversations with one tokenizer.

    Raises (on construction):
        WorkloadError: the tokenizer cannot say which characters a token came from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise WorkloadError(
                f"{type(tokenizer).__name__} cannot say which characters a token came from",
                fix="use a model with a fast tokenizer (a `tokenizer.json`)",
            )
        self._tokenizer = tokenizer
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = added | set(tokenizer.all_special_ids)

    def render(self, conversation: Conversation) -> Rendered:
        """Tokenize a chat (every segment has a role) or a plain prompt (none has), and label every token.

        Raises:
            WorkloadError: the segments are inconsistent, the template fails or changes a content beyond recognition,
                or the prompt is empty.
        """
        _check_segments(conversation.segments)
        # Cut at the borders of labels, and name each piece by its number: whoever writes a token has its labels too.
        segments, sources = _cut(conversation.segments)
        plain = all(s.role is None for s in segments)
        text, owners = _plain_text(segments) if plain else self._chat_text(segments)
        encoding = self._tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True)
        ids: list[int] = encoding["input_ids"]
        if not text or not ids:  # some tokenizers make a lone BOS of no text
            raise WorkloadError("the prompt is empty", fix="give it at least one character")
        if not plain:
            self._check_ids(segments, ids)
        names = [
            self._class_of(token, start, end, text, owners)
            for token, (start, end) in zip(ids, encoding["offset_mapping"], strict=True)
        ]
        labels = [sources[int(n)].labels if n.isdecimal() else () for n in names]
        names = [sources[int(n)].name if n.isdecimal() else n for n in names]
        spans = tuple(SegmentSpan(str(name), a, b) for name, a, b in _runs(names))
        return Rendered(tuple(ids), spans, tuple(_label_spans(labels)))

    def _chat_text(self, segments: tuple[Segment, ...]) -> tuple[str, list[str]]:
        """The rendered chat, and for each of its characters the segment that wrote it, or `template`."""
        messages = _messages(segments)
        contents = [_content(m) for m in messages]
        text = self._apply(messages, contents)
        # An empty content stays empty: a template may test for it, and it leaves no character to find.
        marked = self._apply(messages, [f"\ue000{i}\ue001" if c else "" for i, c in enumerate(contents)])
        rendered = {int(i) for i in _MARKER.findall(marked)}
        for i, content in enumerate(contents):
            if content and i not in rendered:
                raise WorkloadError(
                    f"the chat template drops message {i} (role `{messages[i][0].role}`)",
                    fix="remove the message, or use a tokenizer whose template renders it",
                )
        owners = _owners(text, marked, messages)
        if owners is None:
            raise WorkloadError(
                "the chat template changes the text of a message, so its tokens cannot be told from the template's",
                fix="use plain `prompt` requests, or a template that writes contents as they are or stripped",
            )
        return text, owners

    def _apply(self, messages: list[tuple[Segment, ...]], contents: list[str], tokenize: bool = False) -> Any:
        if self._tokenizer.chat_template is None:
            raise WorkloadError(
                "the tokenizer has no chat template, and the workload consists of chats",
                fix="use plain `prompt` requests (source `jsonl`), or an instruction-tuned model",
            )
        chat = [{"role": m[0].role, "content": c} for m, c in zip(messages, contents, strict=True)]
        try:
            return self._tokenizer.apply_chat_template(
                chat, tokenize=tokenize, return_dict=False, add_generation_prompt=chat[-1]["role"] != "assistant"
            )
        except Exception as e:  # the template is somebody's program: it may raise anything
            roles = ", ".join(str(m["role"]) for m in chat)
            raise WorkloadError(
                f"the chat template refuses a chat with the roles {roles}: {type(e).__name__}: {e}",
                fix="give roles in the order that the model's template accepts; some accept no `system`",
            ) from e

    def _check_ids(self, segments: tuple[Segment, ...], ids: list[int]) -> None:
        """The labelled ids are those that any user of the tokenizer gets for this chat."""
        messages = _messages(segments)
        if self._apply(messages, [_content(m) for m in messages], tokenize=True) != ids:
            raise WorkloadError(
                f"{type(self._tokenizer).__name__}.apply_chat_template gives other tokens than the text it renders",
                fix="use plain `prompt` requests: which token came from which segment is not known here",
            )

    def _class_of(self, token: int, start: int, end: int, text: str, owners: list[str]) -> str:
        special = token in self._special_ids
        if start == end and special:
            return SPECIAL  # the tokenizer wrote it, e.g. BOS: no character stands for it
        if start == end:
            # Some tokenizers trim white space off the offsets (`trim_offsets`), all of it if there is nothing else.
            start = max(start - 1, 0)
        owner = owners[next((i for i in range(start, end) if not text[i].isspace()), start)]
        return SPECIAL if special and owner == TEMPLATE else owner


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
        raise WorkloadError(
            "some segments have a role and some have none", fix="give all a role (chat) or none (prompt)"
        )
    for s in segments:
        if s.name in (TEMPLATE, SPECIAL):
            raise WorkloadError(
                f"`{s.name}` is not a segment's name: it is what the renderer calls tokens that no segment wrote"
            )
        try:
            s.text.encode()
        except UnicodeEncodeError as e:
            raise WorkloadError(
                f"segment `{s.name}` holds a lone surrogate (U+{ord(s.text[e.start]):04X}) at character {e.start}",
                fix="repair the text; a lone surrogate is not a character and has no tokens",
            ) from e


def _messages(segments: tuple[Segment, ...]) -> list[tuple[Segment, ...]]:
    messages = [tuple(group) for _, group in groupby(segments, key=lambda s: s.message)]
    for m in messages:
        if len({s.role for s in m}) > 1:
            raise WorkloadError(f"message {m[0].message} has segments of different roles", fix="number messages apart")
    return messages


def _plain_text(segments: tuple[Segment, ...]) -> tuple[str, list[str]]:
    return "".join(s.text for s in segments), [s.name for s in segments for _ in s.text]


def _content(message: tuple[Segment, ...]) -> str:
    return "".join(s.text for s in message)


def _owners(text: str, marked: str, messages: list[tuple[Segment, ...]]) -> list[str] | None:
    """Who wrote each character of `text`, given the same chat with markers; None if the two do not agree."""
    literal, *rest = _MARKER.split(marked)
    if not text.startswith(literal):
        return None
    owners = [TEMPLATE] * len(literal)
    for number, literal in zip(rest[::2], rest[1::2], strict=True):
        message = messages[int(number)]
        part = _written(_content(message), literal, text, len(owners))
        if part is None:
            return None
        owners += [s.name for s in message for _ in s.text][part]
        owners += [TEMPLATE] * len(literal)
    return owners if len(owners) == len(text) else None


def _written(content: str, literal: str, text: str, at: int) -> slice | None:
    """Which part of `content` the template wrote at `at`, before `literal`: all, or stripped on one or both sides.

    Two answers can fit only where they differ in white space, so no other character ever gets a wrong owner.
    """
    left, right = len(content) - len(content.lstrip()), len(content.rstrip())
    for part in (slice(0, None), slice(left, right), slice(left, None), slice(0, right)):
        if text.startswith(content[part] + literal, at):
            return part
    return None


def _runs(values: Sequence[object]) -> Iterator[tuple[object, int, int]]:
    """Each value with the range in which it stands unchanged."""
    start = 0
    for value, group in groupby(values):
        end = start + sum(1 for _ in group)
        yield value, start, end
        start = end


def _label_spans(labels: list[tuple[tuple[str, str], ...]]) -> Iterator[LabelSpan]:
    """Where labels of one axis overlap, the first one given counts."""
    for axis in sorted({axis for found in labels for axis, _ in found}):
        names = [next((name for a, name in found if a == axis), None) for found in labels]
        yield from (LabelSpan(axis, str(name), a, b) for name, a, b in _runs(names) if name is not None)
