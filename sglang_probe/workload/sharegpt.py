"""Source `sharegpt`: logged conversations in the forms that ShareGPT files have, as JSON list, JSON Lines or Parquet.

    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "..."}
    {"conversation": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

A request is a conversation up to, not including, a turn of the assistant that answers the user; a record without one
is bad. A `system` beside the turns is the system message. Keys that reach no prompt (`id`, `model`, ...) are ignored
(`sources.HARMLESS`, `ignore_keys`); `tools`, turns of tools and unknown keys are refused by name.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from itertools import chain, islice
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from sglang_probe.config import Config
from sglang_probe.errors import WorkloadError
from sglang_probe.workload.files import Raw
from sglang_probe.workload.request import Conversation, Segment
from sglang_probe.workload.sources import TOOLS, FileSource, SourceReport, Text, read_records

_SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "claude", "bot", "model"), "assistant"),
}
"""Who speaks, in lower case, and the role of a chat."""
_TOOL_SPEAKERS = frozenset(
    {"function_call", "observation", "tool", "tool_call", "tool_response", "function", "ipython", "function_response"}
)
_TURNS = ("conversations", "conversation", "items", "messages")
_SYSTEM = ("system", "system_prompt")


class ShareGpt(FileSource):
    """Requests from a ShareGPT file. Those of one conversation are a family."""

    source: Literal["sharegpt"] = "sharegpt"
    turns: Literal["last", "all"] = "last"
    """`all`: one request for every answered turn, each with the true answers of the turns before it."""
    shuffle: bool = False
    """Shuffle the conversations, before `limit`. The turns of one stay together and in order."""
    seed: int = 0
    """Seed of `shuffle`."""

    def conversations(self, report: SourceReport) -> Iterator[Conversation]:
        """The file's requests."""
        records = read_records(self, _Record, report, lambda record, raw: (raw, record.segments()))
        if self.shuffle:
            shuffled = list(records)
            random.Random(self.seed).shuffle(shuffled)
            records = iter(shuffled)
        return islice(chain.from_iterable(self._requests(raw, segments) for raw, segments in records), self.limit)

    def _requests(self, raw: Raw, segments: tuple[Segment, ...]) -> Iterator[Conversation]:
        answered = _answered(segments)
        for i in answered if self.turns == "all" else answered[-1:]:
            yield Conversation(segments[:i], family=f"record-{raw.number}", source=raw.where)


def _answered(segments: tuple[Segment, ...]) -> list[int]:
    """Positions of the assistant's turns that answer the user."""
    roles = [s.role for s in segments]
    return [i for i in range(1, len(roles)) if roles[i - 1 : i + 1] == ["user", "assistant"]]


class _Turn(Config):
    hints: ClassVar[Mapping[str, str]] = dict.fromkeys(("tool_calls", "function_call", "tool_call_id", "tools"), TOOLS)

    speaker: Text
    value: Text

    @model_validator(mode="before")
    @classmethod
    def _in_either_form(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        turn = {k: v for k, v in data.items() if k not in ("from", "value", "role", "content")}
        for name, keys in (("speaker", ("from", "role")), ("value", ("value", "content"))):
            given = [k for k in keys if k in data]
            if len(given) == 2 and data[keys[0]] != data[keys[1]]:
                raise ValueError(f"a turn has both `{keys[0]}` and `{keys[1]}`")
            if not given:
                raise ValueError(f"a turn has neither `{keys[0]}` nor `{keys[1]}`")
            turn[name] = data[given[0]]
        return turn

    @property
    def role(self) -> str:
        """Its role of a chat.

        Raises:
            WorkloadError: a tool speaks, or somebody unknown.
        """
        speaker = self.speaker.strip().lower()
        if speaker in _TOOL_SPEAKERS:
            raise WorkloadError(f"a turn is from `{self.speaker}`: {TOOLS}", reason="tools")
        if speaker not in _SPEAKERS:
            raise WorkloadError(
                f"a turn is from `{self.speaker}`, which is none of {', '.join(_SPEAKERS)}",
                fix="name the speakers by these",
                reason="unknown speaker",
            )
        return _SPEAKERS[speaker]


class _Record(Config):
    synonyms: ClassVar[Collection[str]] = frozenset({*_TURNS, *_SYSTEM})
    hints: ClassVar[Mapping[str, str]] = {
        "tools": TOOLS,
        "functions": TOOLS,
        "prompt": "that is a record for `source: jsonl`",
        "prompt_ids": "that is a record for `source: jsonl`",
        "input_ids": "that is a record for `source: jsonl`",
        "sampling_params": "only `source: jsonl` reads it",
        "family": "the requests of one conversation are a family; only `source: jsonl` reads it",
    }

    conversations: list[_Turn]
    system: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_every_form(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        record = {k: v for k, v in data.items() if k not in _TURNS + _SYSTEM}
        for name, keys in (("conversations", _TURNS), ("system", _SYSTEM)):
            given = [k for k in keys if data.get(k) not in (None, "")]
            if len(given) > 1:
                raise ValueError(f"give either `{given[0]}` or `{given[1]}`")
            if given:
                record[name] = data[given[0]]
        return record

    def segments(self) -> tuple[Segment, ...]:
        """Its turns as messages, the system's first.

        Raises:
            WorkloadError: there is no answer of the assistant, or a turn cannot be used.
        """
        turns = [(t.role, t.value) for t in self.conversations]
        if self.system is not None:
            if turns and turns[0][0] == "system" and turns[0][1] != self.system:
                raise WorkloadError(
                    "`system` and the first turn are different system prompts",
                    fix="leave one out",
                    reason="two system prompts",
                )
            turns = [("system", self.system), *(turns[1:] if turns and turns[0][0] == "system" else turns)]
        segments = tuple(Segment(role, text, role, i) for i, (role, text) in enumerate(turns))
        if not _answered(segments):
            raise WorkloadError(
                "no turn of the assistant (`gpt`) answers one of the user (`human`)", reason="no answer"
            )
        return segments
