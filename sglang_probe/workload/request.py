"""What a workload is made of: text in named segments, and the tokens they become.

A `Conversation` is what a source yields (text); a `Request` is what the engine receives (token ids), with every
token position labelled by the segment it came from. Classes of tokens that no segment wrote have names of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
class Conversation:
    """One request as text. `family` names the requests that share a prefix by design (the unit of clustering)."""

    segments: tuple[Segment, ...]
    family: str | None = None
    sampling_params: dict[str, Any] = field(default_factory=dict)


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
class Request:
    """One request as the engine receives it. `spans` tile `[0, len(prompt_ids))` without gap or overlap."""

    index: int
    rid: str
    prompt_ids: tuple[int, ...]
    spans: tuple[SegmentSpan, ...]
    family: str | None = None
    sampling_params: dict[str, Any] = field(default_factory=dict)
    labels: tuple[LabelSpan, ...] = ()
