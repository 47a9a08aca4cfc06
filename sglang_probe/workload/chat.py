"""What a chat template writes, and who wrote each character of it: observed by rendering with markers.

Three observations, each tried where the one before does not reproduce the rendering to the character:

1. a marker in place of every content: for templates that write contents whole, or stripped;
2. markers around the tags of reasoning (`<think>...</think>`) in the assistant's contents: for templates that move
   reasoning, or drop that of earlier turns;
3. a marker in place of the one part of a content that was written, the rest left standing: for templates that drop the
   beginning or the end of a content by any other rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_probe.config import nearest
from sglang_probe.errors import WorkloadError
from sglang_probe.workload.rendering import Rendering, unread
from sglang_probe.workload.request import TEMPLATE, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Written = tuple[int, str]
"""So many characters in a row, and who wrote them: the name of a segment, or `template`."""

# Private-use characters: no template writes them, strips them or changes their case.
_MARKER = re.compile("\ue000([0-9]+)\ue001")
_TAG = re.compile(r"\s*(?:</?(?:think|thinking|thought|reasoning|seed:think)>|\[/?THINK\]|◁/?think▷)\s*")
_SHAPES = 256
"""Renderings with markers that are remembered: chats of one shape share them."""


class _Part(NamedTuple):
    """Characters `[start, end)` of the content of a message, for which one marker stands."""

    message: int
    start: int
    end: int


class _Message(NamedTuple):
    role: str
    content: str
    segments: tuple[Segment, ...]

    def written(self, start: int, end: int) -> Iterator[Written]:
        """Who wrote characters `[start, end)` of the content."""
        at = 0
        for s in self.segments:
            length = min(end, at + len(s.text)) - max(start, at)
            if length > 0:
                yield length, s.name
            at += len(s.text)


class ChatText:
    """Renders chats with the template of a tokenizer, or with `template`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self._tokenizer = tokenizer
        self._given = template
        self._marked: dict[Any, str] = {}
        self._variables: dict[frozenset[str], str] = {}
        base = next((c for c in type(tokenizer).__mro__ if c.__name__ == "PreTrainedTokenizerBase"), object)
        own = getattr(base, "apply_chat_template", None) is not type(tokenizer).apply_chat_template
        self._ids_to_check = None if own else 1
        """Chats whose tokens are still compared with those of `apply_chat_template`; None: all. That of `transformers`
        tokenizes the text that it renders; another tokenizer's may do anything."""

    @property
    def template(self) -> str | None:
        """The template's text."""
        if self._given is not None:
            return self._given
        own = self._tokenizer.chat_template
        return own.get("default") if isinstance(own, dict) else own

    def render(self, segments: tuple[Segment, ...], options: Rendering) -> tuple[str, list[Written]]:
        """The rendered chat and who wrote it.

        Raises:
            WorkloadError: the template fails, drops a message, or changes one beyond recognition.
        """
        messages = _messages(segments)
        contents = [m.content for m in messages]
        text = self._apply(messages, contents, options)
        for marking in (_whole, _around_tags):
            parts, marked_contents = marking(messages)
            for fresh in (False, True):  # a template may write the time
                marked, remembered = self._with_markers(messages, marked_contents, options, fresh=fresh)
                if marking is _whole:
                    _refuse_dropped(messages, marked)
                    whole = marked
                written = _assembled(text, marked, parts, messages)
                if written is not None:
                    return text, written
                if not remembered:
                    break
        written = self._of_one_part(text, whole, messages, options)
        if written is None:
            raise WorkloadError(
                "the chat template changes the text of a message, so its tokens cannot be told from the template's",
                fix="give the tokens as `prompt_ids`, the rendered text as a plain `prompt`, or another "
                "`chat_template`: one that writes contents as they are, stripped, or a part of them",
            )
        return text, written

    def check_ids(self, segments: tuple[Segment, ...], options: Rendering, ids: list[int]) -> None:
        """The labelled ids are those that any user of the tokenizer gets for this chat.

        Raises:
            WorkloadError: they are not.
        """
        if self._ids_to_check == 0:
            return
        if self._ids_to_check is not None:
            self._ids_to_check -= 1
        messages = _messages(segments)
        if self._apply(messages, [m.content for m in messages], options, tokenize=True) != ids:
            raise WorkloadError(
                f"{type(self._tokenizer).__name__}.apply_chat_template gives other tokens than the text it renders",
                fix="give the tokens as `prompt_ids`: which token came from which segment is not known here",
            )

    def check_variables(self, names: Sequence[str]) -> None:
        """Refuse variables that the template never reads: they would change nothing, unnoticed.

        Raises:
            WorkloadError: names the first.
        """
        key = frozenset(names)
        if key not in self._variables:
            beyond, read = unread(self.template or "", names)
            self._variables[key] = f"`{beyond[0]}`{nearest(beyond[0], read)}" if beyond else ""
        if said := self._variables[key]:
            raise WorkloadError(f"`chat_template_kwargs`: the chat template never reads {said}")

    def _with_markers(
        self, messages: list[_Message], contents: list[str], options: Rendering, *, fresh: bool
    ) -> tuple[str, bool]:
        """The chat with these contents, and whether it was remembered."""
        kwargs = options.chat_template_kwargs
        key = (
            tuple((m.role, c) for m, c in zip(messages, contents, strict=True)),
            options.add_generation_prompt,
            repr(sorted(kwargs.items())) if kwargs else None,
        )
        if not fresh and key in self._marked:
            return self._marked[key], True
        marked = self._apply(messages, contents, options)
        if len(self._marked) >= _SHAPES:
            self._marked.clear()
        self._marked[key] = marked
        return marked, False

    def _of_one_part(
        self, text: str, marked: str, messages: list[_Message], options: Rendering
    ) -> list[Written] | None:
        """Who wrote `text` if the template wrote one part of each content. The parts are found in the text, and proved
        by rendering once more with markers in their place."""
        parts, _ = _whole(messages)
        found = _parts_written(text, marked, parts, messages)
        if found is None or any("\ue000" in m.content for m in messages):
            return None
        proof = [m.content for m in messages]
        for number, part in enumerate(found):
            content = proof[part.message]
            proof[part.message] = f"{content[: part.start]}\ue000{number}\ue001{content[part.end :]}"
        if self._apply(messages, proof, options) != marked:
            return None
        return _assembled(text, marked, found, messages)

    def _apply(self, messages: list[_Message], contents: list[str], options: Rendering, tokenize: bool = False) -> Any:
        if self.template is None:
            raise WorkloadError(
                "the tokenizer has no chat template, and the workload consists of chats",
                fix="use plain `prompt` requests, an instruction-tuned model, or a `chat_template` file",
            )
        kwargs = options.chat_template_kwargs
        if kwargs:
            self.check_variables(sorted(kwargs))
        chat = [{"role": m.role, "content": c} for m, c in zip(messages, contents, strict=True)]
        begin = options.add_generation_prompt
        if begin is None:
            begin = chat[-1]["role"] != "assistant"
        try:
            return self._tokenizer.apply_chat_template(
                chat,
                chat_template=self._given,
                tokenize=tokenize,
                return_dict=False,
                add_generation_prompt=begin,
                **kwargs,
            )
        except Exception as e:  # the template is somebody's program: it may raise anything
            roles = ", ".join(m["role"] for m in chat)
            raise WorkloadError(
                f"the chat template refuses a chat with the roles {roles}: {type(e).__name__}: {e}",
                fix="give roles in the order that the model's template accepts; some accept no `system`",
            ) from e


def _messages(segments: tuple[Segment, ...]) -> list[_Message]:
    grouped = (tuple(group) for _, group in groupby(segments, key=lambda s: s.message))
    return [_Message(str(g[0].role), "".join(s.text for s in g), g) for g in grouped]


def _whole(messages: list[_Message]) -> tuple[list[_Part], list[str]]:
    """One marker a content. An empty one stays empty: a template may test for it, and it leaves nothing to find."""
    parts = [_Part(i, 0, len(m.content)) for i, m in enumerate(messages) if m.content]
    return parts, _marked(messages, parts)


def _around_tags(messages: list[_Message]) -> tuple[list[_Part], list[str]]:
    """Markers for what stands between the tags of reasoning, where the assistant speaks."""
    parts: list[_Part] = []
    for i, m in enumerate(messages):
        edges = [0, len(m.content)]
        if m.role == "assistant":
            edges[1:1] = [x for tag in _TAG.finditer(m.content) for x in tag.span()]
        parts += [_Part(i, a, b) for a, b in list(pairwise(edges))[::2] if a < b]
    return parts, _marked(messages, parts)


def _marked(messages: list[_Message], parts: list[_Part]) -> list[str]:
    contents = []
    for i, m in enumerate(messages):
        text, at = "", 0
        for number, part in enumerate(parts):
            if part.message == i:
                text += f"{m.content[at : part.start]}\ue000{number}\ue001"
                at = part.end
        contents.append(text + m.content[at:])
    return contents


def _refuse_dropped(messages: list[_Message], marked: str) -> None:
    rendered = {int(n) for n in _MARKER.findall(marked)}
    numbers = iter(range(len(messages)))
    for i, m in enumerate(messages):
        if m.content and next(numbers) not in rendered:
            raise WorkloadError(
                f"the chat template drops message {i} (role `{m.role}`)",
                fix="remove the message, or use a tokenizer whose template renders it",
            )


def _assembled(text: str, marked: str, parts: list[_Part], messages: list[_Message]) -> list[Written] | None:
    """Who wrote `text`, given the same chat with markers; None if the two do not agree."""
    literal, *rest = _MARKER.split(marked)
    if not text.startswith(literal):
        return None
    numbers, literals = [int(n) for n in rest[::2]], rest[1::2]
    at, before = len(literal), None
    written = []
    for number, after in zip(numbers, literals, strict=True):
        part = parts[number]
        written += _literal(literal, before, part, parts, messages)
        content = messages[part.message].content[part.start : part.end]
        found = _written(content, after, text, at)
        if found is None:
            return None
        start, end = found
        written += messages[part.message].written(part.start + start, part.start + end)
        at += end - start + len(after)
        literal, before = after, part
    written += _literal(literal, before, None, parts, messages)
    with_length = [(n, who) for n, who in written if n]
    return with_length if at == len(text) else None


def _written(content: str, literal: str, text: str, at: int) -> tuple[int, int] | None:
    """Which part of `content` the template wrote at `at`, before `literal`: all, or stripped on one or both sides.

    Two answers can fit only where they differ in white space, so no other character ever gets a wrong owner.
    """
    left, right = len(content) - len(content.lstrip()), len(content.rstrip())
    for start, end in ((0, len(content)), (left, right), (left, len(content)), (0, right)):
        if text.startswith(content[start:end] + literal, at):
            return start, max(start, end)
    return None


def _literal(
    literal: str, before: _Part | None, after: _Part | None, parts: list[_Part], messages: list[_Message]
) -> list[Written]:
    """Who wrote what stands between two markers: the template, but for tags that stand so in the content itself."""
    left: list[Written] = []
    right: list[Written] = []
    if before is not None:
        message = messages[before.message]
        same = after is not None and after.message == before.message and after.start >= before.end
        following = after.start if same and after is not None else len(message.content)
        own = message.content[before.end : following]
        if same and literal == own:
            return list(message.written(before.end, following))
        if not same and own and literal.startswith(own):
            left, literal = list(message.written(before.end, following)), literal[len(own) :]
    if after is not None and after == next(p for p in parts if p.message == after.message):
        message = messages[after.message]
        own = message.content[: after.start]
        if own and literal.endswith(own):
            right, literal = list(message.written(0, after.start)), literal[: -len(own)]
    return [*left, (len(literal), TEMPLATE), *right]


def _parts_written(text: str, marked: str, parts: list[_Part], messages: list[_Message]) -> list[_Part] | None:
    """For every marker, in the order of `parts`, the part of the content that stands in the text; None if it cannot
    be told."""
    literal, *rest = _MARKER.split(marked)
    if not text.startswith(literal):
        return None
    at, found = len(literal), list(parts)
    for k, (number, after) in enumerate(zip(map(int, rest[::2]), rest[1::2], strict=True)):
        part = parts[number]
        content = messages[part.message].content
        whole = _written(content, after, text, at)
        ends = (
            [at + whole[1] - whole[0]] if whole else _ends(text, after, at, len(content), last=2 * k + 2 == len(rest))
        )
        fitting = [end for end in ends if text[at:end] in content]
        if len(fitting) != 1:
            return None
        piece = text[at : fitting[0]]
        start = len(content) - len(piece) if content.endswith(piece) else content.find(piece)
        if whole:
            start = whole[0]
        if found[number] not in (part, chosen := _Part(part.message, start, start + len(piece))):
            return None
        found[number] = chosen
        at = fitting[0] + len(after)
    return found


def _ends(text: str, literal: str, at: int, most: int, *, last: bool) -> list[int]:
    """Where what is written at `at` may end: wherever `literal` follows."""
    if not literal:
        return [len(text)] if last else []
    return [
        m.start() for m in re.finditer(f"(?={re.escape(literal)})", text[: at + most + len(literal)]) if m.start() >= at
    ]
