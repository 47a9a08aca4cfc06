"""Source `retrieval`: puzzles with ground truth for the built-in model `probe-recall`.

    {"source": "retrieval", "task": "chase", "count": 96, "prompt_tokens": 228, "distractors": 24, "answers": 8,
     "depth": [0.1, 0.5, 0.9], "question": "hidden"}

Every request knows its answers and the positions that they are read from (`request.Truth`). A `recall` request reveals
its later questions while it is decoded: their keys are prescribed output tokens (`custom_params.probe.force`), the
answers between them are the model's own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sglang_probe.ask import Ask
from sglang_probe.config import Config
from sglang_probe.paths import shipped
from sglang_probe.workload.facts import SEPARATOR, WORDS, Puzzle, Task, draw_puzzle
from sglang_probe.workload.request import Conversation, Segment, Truth
from sglang_probe.workload.sources import SourceReport

_AROUND = 4
"""Tokens of a prompt besides its body: `<bos>` before it, the separator, the marker and the key after it."""
_BODY = 1
"""Position of the body's first token."""
_IDS = {word: i for i, word in enumerate(WORDS)}


class Retrieval(Config):
    """Facts in noise, a separator, and a question about one of the facts."""

    source: Literal["retrieval"] = "retrieval"
    task: Task = "recall"
    """What is asked: `recall` looks facts up, `chase` follows a chain of facts, `copy` repeats a span."""
    count: int = Field(default=64, ge=1)
    """Number of requests."""
    seed: int = 0
    """Seed of the puzzles."""
    prompt_tokens: int = Field(default=228, ge=8)
    """Length of every prompt, question and `<bos>` included. What the facts leave is noise."""
    answers: int = Field(default=8, ge=1)
    """Answers of a request: questions (`recall`), steps (`chase`), or symbols of the span (`copy`)."""
    distractors: int = Field(default=16, ge=0)
    """Facts that are not asked for. Those of `chase` lie on the same cycle, after the ones that are."""
    depth: list[Annotated[float, Field(ge=0, le=1)]] | None = None
    """Where the first answer's fact begins, taken in turn by the requests; by default anywhere."""
    question: Literal["visible", "hidden"] = "hidden"
    """Whether the question belongs to the context that may be compressed. The prompt is the same."""
    reader: Literal["probe-recall", "probe-recall-1"] = "probe-recall"
    """The built-in model whose positions `needed_causal` names. The prompt is the same."""

    @property
    def body(self) -> int:
        """Tokens of facts and noise."""
        return self.prompt_tokens - _AROUND

    @model_validator(mode="after")
    def _drawable(self) -> Retrieval:
        self._draw(0)
        return self

    def _draw(self, index: int) -> Puzzle:
        """The puzzle of request `index`: it depends on the seed, the index and the shape, on no other request."""
        copies = self.task == "copy"
        return draw_puzzle(
            self.task,
            random.Random(f"{self.seed}/{self.task}/{index}"),
            body=self.body,
            facts=self.distractors + (1 if copies else self.answers),
            answers=self.answers,
            span=self.answers if copies else 1,
            depth=self.depth[index % len(self.depth)] if self.depth else None,
        )

    def conversations(self, report: SourceReport) -> Iterator[Conversation]:
        """One plain prompt for each request. Nothing is shared between requests."""
        for index in range(self.count):
            puzzle = self._draw(index)
            truth = _truth(puzzle, self.reader, hidden=self.question == "hidden")
            yield Conversation(_segments(puzzle), None, _sampling(puzzle), truth)


def _segments(puzzle: Puzzle) -> tuple[Segment, ...]:
    """Facts that are asked for, other facts (`distractor`), noise (`filler`), separator and question."""
    names = ["filler"] * len(puzzle.body)
    for i, fact in enumerate(puzzle.facts):
        name = "fact" if i in puzzle.asked else "distractor"
        names[fact.start : fact.start + len(fact.words)] = [name] * len(fact.words)
    words = [*puzzle.body, SEPARATOR, *puzzle.question]
    owned = zip([*names, "separator", *["question"] * len(puzzle.question)], words, strict=True)
    runs = [(name, [w for _, w in run]) for name, run in groupby(owned, key=lambda x: x[0])]
    return tuple(Segment(name, " ".join(run) + (" " if name != "question" else "")) for name, run in runs)


def _sampling(puzzle: Puzzle) -> dict[str, Any]:
    params: dict[str, Any] = {"max_new_tokens": len(puzzle.continuation), "temperature": 0.0, "ignore_eos": True}
    if puzzle.task == "recall" and len(puzzle.asked) > 1:
        revealed = [None if i in puzzle.answer_steps else _IDS[word] for i, word in enumerate(puzzle.continuation)]
        return Ask(force=tuple(revealed)).into(params)
    return params


def _truth(puzzle: Puzzle, reader: str, *, hidden: bool) -> Truth:
    prompt = [_IDS[w] for w in ("<bos>", *puzzle.body, SEPARATOR, *puzzle.question)]
    at = [_BODY + puzzle.facts[f].start + o for f, o in zip(puzzle.asked, puzzle.offsets, strict=True)]
    reads = need_offsets(reader).get(puzzle.task)
    first = puzzle.facts[puzzle.asked[0]]
    return Truth(
        task=puzzle.task,
        prompt_ids=tuple(prompt),
        context_len=len(prompt) - (len(puzzle.question) if hidden else 0),
        continuation_ids=tuple(_IDS[w] for w in puzzle.continuation),
        answer_ids=tuple(_IDS[w] for w in puzzle.answers),
        answer_steps=puzzle.answer_steps,
        # The word before an answer is what the question names: the key, or the last symbol.
        needed_content=tuple((a - 1, a) for a in at),
        needed_causal=None if reads is None else tuple(_within(a, reads, len(puzzle.body)) for a in at),
        depth=first.start / max(1, len(puzzle.body) - len(first.words)),
    )


def _within(answer: int, offsets: list[int], body: int) -> tuple[int, ...]:
    return tuple(answer + o for o in offsets if _BODY <= answer + o < _BODY + body)


@cache
def need_offsets(reader: str) -> dict[Task, list[int]]:
    """For each task the positions that a built-in model reads, relative to that of the answer in its fact.

    Found by knock-out (models/probe-recall/inspect_need.py), which writes them beside the checkpoint.
    """
    found = json.loads((shipped(f"models/{reader}") / "need.json").read_text(encoding="utf-8"))
    return {task: about["offsets"] for task, about in found["tasks"].items()}
