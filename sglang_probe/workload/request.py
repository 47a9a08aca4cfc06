"""What a workload is made of: text in named segments, and the tokens they become.

A `Conversation` is what a source yields (text); a `Request` is what the engine receives (token ids), with every
token position labelled by the segment it came from. Classes of tokens that no segment wrote have names of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sglang_probe.ask import Ask
from sglang_probe.workload.rendering import RecordRendering

TEMPLATE = "template"
"""Class of tokens the chat template wrote (role names, newlines), other than special tokens."""
SPECIAL = "special"
"""Class of the tokenizer's special tokens."""


@dataclass(frozen=True)
class Label:
    """Characters `[start, end)` of a segment's text are of class `name` along the user's own axis `axis`."""

    axis: str
    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt with a name, e.g. `system`, `exemplar`, `document`, `user`, `assistant`.

    `role` is the chat role of the message the piece belongs to, or None in a plain prompt. Consecutive segments
    with the same `message` number form one message.
    """

    name: str
    text: str
    role: str | None = None
    message: int = 0
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True)
class Truth:
    """What the right output of a request is, and which positions of its prompt it is read from.

    Answer `j` is output token `answer_steps[j]`. Its needed positions are those that a reader needs: by content (the
    words of the fact), and causally (what the model was found to read; None if it was not inspected).
    """

    task: str
    prompt_ids: tuple[int, ...]
    """The tokens that positions refer to. A request whose prompt becomes others is refused."""
    context_len: int
    """Positions `[0, context_len)` are what may be compressed: all that comes before the first hidden question."""
    continuation_ids: tuple[int, ...]
    """The right output from its first token on: answers, and questions revealed between them."""
    answer_ids: tuple[int, ...]
    answer_steps: tuple[int, ...]
    needed_content: tuple[tuple[int, ...], ...]
    needed_causal: tuple[tuple[int, ...], ...] | None
    depth: float
    """Where the first answer's fact begins, as a fraction of the places where it could: 0 first, 1 last."""


@dataclass(frozen=True)
class SegmentSpan:
    """Token positions `[start, end)` of a prompt that belong to the segment class `name`."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class LabelSpan:
    """Token positions `[start, end)` of a prompt that are of class `name` along the user's axis `axis`."""

    axis: str
    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A prompt as the engine receives it. `spans` tile `[0, len(prompt_ids))`; `labels` of one axis are disjoint."""

    prompt_ids: tuple[int, ...]
    spans: tuple[SegmentSpan, ...]
    labels: tuple[LabelSpan, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """One request as text. `family` names the requests that share a prefix by design (the unit of clustering)."""

    segments: tuple[Segment, ...]
    family: str | None = None
    sampling_params: dict[str, Any] = field(default_factory=dict)
    truth: Truth | None = None
    source: str | None = field(default=None, compare=False)
    """Where it was read, e.g. `requests.jsonl:17`; None: it was made in code."""
    rendering: RecordRendering | None = None
    """What it says of its rendering itself."""
    rendered: Rendered | None = None
    """Its tokens, where it comes as token ids and has no `segments`."""


@dataclass(frozen=True)
class Request:
    """One request as the engine receives it. `spans` tile `[0, len(prompt_ids))` without gap or overlap."""

    index: int
    rid: str
    prompt_ids: tuple[int, ...]
    spans: tuple[SegmentSpan, ...]
    family: str | None = None
    sampling_params: dict[str, Any] = field(default_factory=dict)
    labels: tuple[LabelSpan, ...] = ()
    truth: Truth | None = None
    source: str | None = field(default=None, compare=False)
    """As in `Conversation`."""

    @property
    def where(self) -> str:
        """How error messages name it: file and line, or its id."""
        return f"request {self.rid}" if self.source is None else f"{self.source} (request {self.rid})"

    @cached_property
    def ask(self) -> Ask:
        """What it asks of the probe.

        Raises:
            ConfigError: as `Ask.of`.
        """
        return Ask.of(self.sampling_params)


def asked_rid(rid: str) -> str:
    """The id under which a workload knows a request that a resumed run asked again, as `<rid>~<start>`."""
    return rid.partition("~")[0]
