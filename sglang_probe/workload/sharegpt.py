"""Source `sharegpt`: logged conversations in the format of ShareGPT, as a JSON list or as JSONL.

    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

A request is a conversation up to, not including, a `gpt` turn that answers a human; a record without one is bad.
Other keys of a record (`id`, `model`, ...) do not reach a prompt and are ignored.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, islice
from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from sglang_probe.config import Config
from sglang_probe.workload.request import Conversation, Segment
from sglang_probe.workload.sources import FileSource, SourceReport, Text, read_list_or_lines

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


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
        records = read_list_or_lines(self, _Record, report)
        if self.shuffle:
            shuffled = list(records)
            random.Random(self.seed).shuffle(shuffled)
            records = iter(shuffled)
        return islice(chain.from_iterable(self._requests(n, r) for n, r in records), self.limit)

    def _requests(self, number: int, record: _Record) -> Iterator[Conversation]:
        segments = tuple(
            Segment(_ROLES[t.speaker], t.value, _ROLES[t.speaker], i) for i, t in enumerate(record.conversations)
        )
        answered = record.answered()
        for i in answered if self.turns == "all" else answered[-1:]:
            yield Conversation(segments[:i], family=f"record-{number}", source=f"{self.path}: record {number}")


class _Turn(Config):
    model_config = ConfigDict(extra="ignore")

    speaker: Literal["human", "gpt", "system"] = Field(alias="from")
    value: Text


class _Record(Config):
    model_config = ConfigDict(extra="ignore")

    conversations: list[_Turn]

    def answered(self) -> list[int]:
        """Positions of the `gpt` turns that answer a human."""
        speakers = [t.speaker for t in self.conversations]
        return [i for i in range(1, len(speakers)) if speakers[i - 1 : i + 1] == ["human", "gpt"]]

    @model_validator(mode="after")
    def _has_an_answer(self) -> _Record:
        if not self.answered():
            raise ValueError("no `gpt` turn answers a `human` turn")
        return self
