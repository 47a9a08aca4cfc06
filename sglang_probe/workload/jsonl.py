"""Source `jsonl`: the user's own requests, one JSON object a line (or a JSON list, or Parquet).

    {"messages": [{"role": "user", "content": "..."}], "family": "a", "sampling_params": {"max_new_tokens": 8}}
    {"prompt": "..."}
    {"prompt_ids": [1, 42, 7], "segments": [[0, 1, "special"], [1, 3, "document"]]}
    {"custom_id": "q1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 5}}

    {"messages": [{"role": "user", "content": "Ada was born in 1815.",
                   "labels": {"entity": [[0, 3, "person"], [16, 20, "year"]]}}]}

`prompt_ids` (or `input_ids`) are served as they are; `segments` are spans of them, and what no span names is `prompt`.
`labels` are axes of token classes of the user's own, as character spans `[start, end, class]` of the content (or of the
prompt; of `prompt_ids`, spans of tokens). A message's segment has the name of its role, or of its key `segment`; that
of a plain prompt is `prompt`. Unknown keys are errors, because a key that changes the prompt elsewhere (`tools`, say)
must not be dropped unnoticed; some that reach no prompt are allowed and ignored (`sources.HARMLESS`, `ignore_keys`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, StrictInt, field_validator, model_validator

from sglang_probe.axes.axes import AXES
from sglang_probe.config import Config
from sglang_probe.workload.openai_batch import OF_A_BODY, unwrapped
from sglang_probe.workload.rendering import RecordRendering
from sglang_probe.workload.request import (
    SPECIAL,
    TEMPLATE,
    Conversation,
    Label,
    LabelSpan,
    Rendered,
    Segment,
    SegmentSpan,
)
from sglang_probe.workload.sources import TOOLS, FileSource, SourceReport, Text, read_records


class Jsonl(FileSource):
    """Requests from a file of records."""

    source: Literal["jsonl"] = "jsonl"

    def conversations(self, report: SourceReport) -> Iterator[Conversation]:
        """The file's requests in file order."""
        found = read_records(self, _Line, report, lambda line, raw: line.conversation(raw.where))
        return islice(found, self.limit)


_MOVED = "sampling values go into `sampling_params`, by SGLang's names"
_TOOL_CALLS = f"tool calls are not supported: {TOOLS.partition(': ')[2]}"
_NOT_PROMPT = "it is no part of the prompt; `ignore_keys` leaves it out"


class _Labelled(Config):
    labels: dict[str, list[tuple[int, int, str]]] = Field(default_factory=dict)

    def _label(self, text: str) -> tuple[Label, ...]:
        return tuple(
            Label(axis, *_checked(axis, span, len(text), "characters", f"text of {len(text)}"))
            for axis, spans in self.labels.items()
            for span in spans
        )

    @field_validator("labels")
    @classmethod
    def _axes_of_their_own(cls, labels: dict[str, Any]) -> dict[str, Any]:
        if taken := AXES.keys() & labels.keys():
            raise ValueError(f"`{min(taken)}` is an axis that every run has; name yours otherwise")
        return labels


def _checked(axis: str, span: tuple[int, int, str], length: int, unit: str, of: str) -> tuple[str, int, int]:
    start, end, name = span
    if not 0 <= start < end <= length:
        raise ValueError(f"label `{name}` of axis `{axis}`: no {unit} {start} to {end} in a {of}")
    return name, start, end


class _Message(_Labelled):
    hints: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("tool_calls", "tool_call_id", "function_call", "tools"), _TOOL_CALLS),
        "name": "templates differ in what they make of it; put it into the content, or into `ignore_keys`",
        "reasoning_content": "put it into the content as the model writes it (`<think>...</think>`), or into "
        "`ignore_keys`",
        "from": "that is ShareGPT's form: `source: sharegpt`",
        "value": "that is ShareGPT's form: `source: sharegpt`",
        "text": "did you mean `content`?",
    }

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


_Span = tuple[StrictInt, StrictInt, Annotated[Text, Field(min_length=1)]]


class _Line(_Labelled, RecordRendering):
    synonyms: ClassVar[Collection[str]] = frozenset({"input_ids", "body", "method", "url"})
    hints: ClassVar[Mapping[str, str]] = {
        "text": "did you mean `prompt`?",
        "content": "did you mean `prompt`, or a message of `messages`?",
        "tokens": "did you mean `prompt_ids`?",
        "token_ids": "did you mean `prompt_ids`?",
        "tools": TOOLS,
        "functions": TOOLS,
        "tool_choice": TOOLS,
        "tool_calls": _TOOL_CALLS,
        "system": "give it as the first of `messages`, or read the file as `source: sharegpt`",
        "system_prompt": "give it as the first of `messages`, or read the file as `source: sharegpt`",
        **dict.fromkeys(("conversations", "conversation", "items"), "that is ShareGPT's form: `source: sharegpt`"),
        **dict.fromkeys(("completion", "response", "answer", "chosen", "rejected", "labels_ids"), _NOT_PROMPT),
        "attention_mask": _NOT_PROMPT,
        **dict.fromkeys(
            ("instruction", "input", "output"), "put what the model shall read into `prompt` or `messages`"
        ),
        "question": "did you mean `prompt`?",
        **dict.fromkeys(OF_A_BODY, _MOVED),
    }

    messages: list[_Message] | None = Field(default=None, min_length=1)
    prompt: Text | None = None
    prompt_ids: list[StrictInt] | None = Field(default=None, min_length=1)
    segments: list[_Span] | None = None
    family: Text | None = None
    sampling_params: dict[str, Any] = Field(default_factory=dict)
    _rendered: Rendered | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _as_people_write_it(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = unwrapped(data)
        prompt = data.get("prompt")
        if isinstance(prompt, list) and prompt:
            if all(isinstance(m, dict) for m in prompt) and "messages" not in data:  # TRL, verl
                data["messages"] = data.pop("prompt")
            elif all(isinstance(t, int) for t in prompt) and "prompt_ids" not in data:  # OpenAI's completions
                data["prompt_ids"] = data.pop("prompt")
        if "input_ids" in data:
            if "prompt_ids" in data:
                raise ValueError("give either `prompt_ids` or `input_ids`")
            data["prompt_ids"] = data.pop("input_ids")
        if isinstance(data.get("segments"), list):  # as `requests.parquet` of a run has them
            keys = ("start", "end", "name")
            data["segments"] = [
                tuple(s[k] for k in keys) if isinstance(s, dict) and s.keys() == set(keys) else s
                for s in data["segments"]
            ]
        return data

    @model_validator(mode="after")
    def _one_of_three(self) -> _Line:
        given = [x is not None for x in (self.messages, self.prompt, self.prompt_ids)]
        if sum(given) != 1:
            raise ValueError("give one of `messages`, `prompt` and `prompt_ids`")
        if self.labels and self.messages is not None:
            raise ValueError("`labels` of a chat belong to its messages")
        if self.segments is not None and self.prompt_ids is None:
            raise ValueError("`segments` are spans of `prompt_ids`")
        if self.prompt_ids is not None:
            said = {k for k in RecordRendering.model_fields if getattr(self, k)}
            if said:
                raise ValueError(f"`{min(said)}` has no meaning beside `prompt_ids`, which are served as they are")
            self._rendered = self._as_they_are(self.prompt_ids)
        else:
            self._label(self.prompt or "")
        return self

    def _as_they_are(self, prompt_ids: list[int]) -> Rendered:
        ids = tuple(prompt_ids)
        spans, at = [], 0
        for start, end, name in self.segments or []:
            if not at <= start < end <= len(ids):
                raise ValueError(f"segment `{name}`: [{start}, {end}) is not within [{at}, {len(ids)}), or is empty")
            if start > at:
                spans.append(SegmentSpan("prompt", at, start))
            spans.append(SegmentSpan(name, start, end))
            at = end
        if at < len(ids):
            spans.append(SegmentSpan("prompt", at, len(ids)))
        labels = []
        for axis, given in self.labels.items():
            end = 0
            for span in sorted(given):
                checked = _checked(axis, span, len(ids), "tokens", f"prompt of {len(ids)}")
                if checked[1] < end:
                    raise ValueError(f"labels of axis `{axis}` overlap at token {checked[1]}")
                end = checked[2]
                labels.append(LabelSpan(axis, *checked))
        return Rendered(ids, tuple(spans), tuple(labels))

    def conversation(self, source: str) -> Conversation:
        if self._rendered is not None:
            return Conversation((), self.family, self.sampling_params, source=source, rendered=self._rendered)
        if self.prompt is not None:
            segments = [Segment("prompt", self.prompt, labels=self._label(self.prompt))]
        else:
            segments = [
                Segment(m.segment or m.role, m.content, m.role, i, m._label(m.content))
                for i, m in enumerate(self.messages or [])
            ]
        said = {k: getattr(self, k) for k in RecordRendering.model_fields}
        own = RecordRendering(**said) if any(v not in (None, {}) for v in said.values()) else None
        return Conversation(tuple(segments), self.family, self.sampling_params, source=source, rendering=own)
