"""Source `jsonl`: the user's own requests, one JSON object a line.

    {"messages": [{"role": "user", "content": "..."}], "family": "a", "sampling_params": {"max_new_tokens": 8}}
    {"prompt": "..."}

    {"messages": [{"role": "user", "content": "Ada was born in 1815.",
                   "labels": {"entity": [[0, 3, "person"], [16, 20, "year"]]}}]}

`labels` are axes of token classes of the user's own, as character spans `[start, end, class]` of the content (or of the
prompt). A message's segment has the name of its role, or of its key `segment`; that of a plain prompt is `prompt`.
Unknown keys are errors, because a key that changes the prompt elsewhere (`tools`, say) must not be dropped unnoticed;
`id` is allowed and ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sglang_probe.axes.axes import AXES
from sglang_probe.config import Config
from sglang_probe.workload.request import SPECIAL, TEMPLATE, Conversation, Label, Segment
from sglang_probe.workload.sources import FileSource, SourceReport, Text, read_lines


class Jsonl(FileSource):
    """Requests from a JSONL file."""

    source: Literal["jsonl"] = "jsonl"

    def conversations(self, report: SourceReport) -> Iterator[Conversation]:
        """The file's requests in file order."""
        lines = read_lines(self, _Line, report)
        return islice((line.conversation(f"{self.path}:{n}") for n, line in lines), self.limit)


class _Labelled(Config):
    labels: dict[str, list[tuple[int, int, str]]] = Field(default_factory=dict)

    def _label(self, text: str) -> tuple[Label, ...]:
        return tuple(Label(axis, *_checked(axis, span, text)) for axis, spans in self.labels.items() for span in spans)

    @field_validator("labels")
    @classmethod
    def _axes_of_their_own(cls, labels: dict[str, Any]) -> dict[str, Any]:
        if taken := AXES.keys() & labels.keys():
            raise ValueError(f"`{min(taken)}` is an axis that every run has; name yours otherwise")
        return labels


def _checked(axis: str, span: tuple[int, int, str], text: str) -> tuple[str, int, int]:
    start, end, name = span
    if not 0 <= start < end <= len(text):
        raise ValueError(f"label `{name}` of axis `{axis}`: no characters {start} to {end} in a text of {len(text)}")
    return name, start, end


class _Message(_Labelled):
    role: Text = Field(min_length=1)
    content: Text
    segment: Text | None = Field(default=None, min_length=1)

    @field_validator("content", mode="before")
    @classmethod
    def _join_text_parts(cls, content: Any) -> Any:
        """OpenAI's form of a content: a list of parts. Only text has tokens of its own here."""
        if not isinstance(content, list):
            return content
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError('only text parts are supported: {"type": "text", "text": "..."}')
        return "".join(part["text"] for part in content)

    @model_validator(mode="after")
    def _not_reserved(self) -> _Message:
        if (name := self.segment or self.role) in (TEMPLATE, SPECIAL):
            raise ValueError(f"`{name}` names tokens that no segment wrote; name the segment otherwise")
        self._label(self.content)
        return self


class _Line(_Labelled):
    messages: list[_Message] | None = Field(default=None, min_length=1)
    prompt: Text | None = Field(default=None, min_length=1)
    family: Text | None = None
    sampling_params: dict[str, Any] = Field(default_factory=dict)
    id: Any = None

    @model_validator(mode="after")
    def _one_of_two(self) -> _Line:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either `messages` or `prompt`")
        if self.labels and self.prompt is None:
            raise ValueError("`labels` of a chat belong to its messages")
        self._label(self.prompt or "")
        return self

    def conversation(self, source: str) -> Conversation:
        if self.prompt is not None:
            segments = [Segment("prompt", self.prompt, labels=self._label(self.prompt))]
        else:
            segments = [
                Segment(m.segment or m.role, m.content, m.role, i, m._label(m.content))
                for i, m in enumerate(self.messages or [])
            ]
        return Conversation(tuple(segments), self.family, self.sampling_params, source=source)
