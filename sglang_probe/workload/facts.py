"""Puzzles with one right answer: facts hidden in noise, a separator, a question, and the answers that follow.

Three tasks over one vocabulary of words (`WORDS`), each a body of `body` tokens in which noise and facts are mixed:

- `recall`: facts `k v ;`. The question names a key, the answer is its value. With several answers the next key follows
  the value, so later questions are revealed one at a time and must be given (forced), not generated.
- `chase`: facts `k l ;` that form one cycle through all keys. Each answer is the key of the next question.
- `copy`: facts `k s1 .. sL ;`. The question names a key, the answers are the symbols of its span in order.

    <bos> n3 k7 v1 ; n9 k2 v8 ; n4 <sep> <recall> k2 | v8 k7 v1
    <bos> n3 k7 k2 ; n9 k2 k5 ; k5 k7 ; n4 <sep> <chase> k2 | k5 k7 k2
    <bos> n3 k7 v1 v6 v4 ; n9 k2 v8 v3 v5 ; <sep> <copy> k7 | v1 v6 v4

Nothing before `<sep>` and including it depends on the question, so a cache can be compressed before the question.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Task = Literal["recall", "chase", "copy"]
TASKS: tuple[Task, ...] = ("recall", "chase", "copy")

KEYS = [f"k{i}" for i in range(64)]
VALUES = [f"v{i}" for i in range(64)]
NOISE = [f"n{i}" for i in range(56)]
END = ";"
SEPARATOR = "<sep>"
MARKERS: dict[Task, str] = {"recall": "<recall>", "chase": "<chase>", "copy": "<copy>"}
SPECIAL_WORDS = ["<pad>", "<bos>", "<eos>"]
WORDS = [*SPECIAL_WORDS, END, SEPARATOR, *MARKERS.values(), *KEYS, *VALUES, *NOISE]
"""The vocabulary. A word's token id is its index."""


@dataclass(frozen=True)
class Fact:
    """A fact of a body: `words` begin at token `start` of the body."""

    words: tuple[str, ...]
    start: int


@dataclass(frozen=True)
class Puzzle:
    """A body with its facts, and the questions asked about it.

    `asked[j]` is the fact of `facts` that answer `j` is read from, and `offsets[j]` the answer's place in that fact.
    """

    task: Task
    body: tuple[str, ...]
    facts: tuple[Fact, ...]
    asked: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def question(self) -> tuple[str, str]:
        """What follows the separator: the task's marker and the first key."""
        return MARKERS[self.task], self.facts[self.asked[0]].words[0]

    @property
    def answers(self) -> tuple[str, ...]:
        """The right answers in order."""
        return tuple(self.facts[f].words[o] for f, o in zip(self.asked, self.offsets, strict=True))

    @property
    def continuation(self) -> tuple[str, ...]:
        """What follows the question: the answers, and for `recall` the keys of the later questions between them."""
        if self.task != "recall":
            return self.answers
        words: list[str] = []
        for fact, answer in zip(self.asked, self.answers, strict=True):
            words += [self.facts[fact].words[0], answer]
        return tuple(words[1:])

    @property
    def answer_steps(self) -> tuple[int, ...]:
        """Index of each answer in `continuation`."""
        step = 2 if self.task == "recall" else 1
        return tuple(step * j for j in range(len(self.asked)))


def draw_puzzle(
    task: Task,
    rng: random.Random,
    *,
    body: int,
    facts: int,
    answers: int,
    span: int = 8,
    depth: float | None = None,
    keys: Sequence[str] = KEYS,
    values: Sequence[str] = VALUES,
) -> Puzzle:
    """A puzzle whose body has exactly `body` tokens.

    The first question's fact begins as near to `depth * (body - its length)` as the other facts leave it (they are not
    cut), anywhere if None. All other facts and the noise are shuffled.

    Raises:
        ValueError: the facts do not fit into the body, there are fewer facts than answers need, or there are more facts
            than the vocabulary has words for.
    """
    texts = _fact_texts(task, rng, facts, span, keys, values)
    length = len(texts[0])
    if facts * length > body:
        raise ValueError(f"{facts} facts of {length} tokens do not fit into {body}")
    if answers > (span if task == "copy" else facts):
        raise ValueError(f"{answers} answers, but only {span if task == 'copy' else facts} can be asked for")
    order = list(range(facts)) + [-1] * (body - facts * length)
    rng.shuffle(order)
    if depth is not None:
        order = _moved(order, depth * (body - length), length)
    words: list[str] = []
    starts = [0] * facts
    for item in order:
        if item < 0:
            words.append(rng.choice(NOISE))
        else:
            starts[item] = len(words)
            words += texts[item]
    asked = [0] * answers if task == "copy" else list(range(answers))
    offsets = list(range(1, answers + 1)) if task == "copy" else [1] * answers
    placed = tuple(Fact(t, s) for t, s in zip(texts, starts, strict=True))
    return Puzzle(task, tuple(words), placed, tuple(asked), tuple(offsets))


def _fact_texts(
    task: Task, rng: random.Random, facts: int, span: int, keys: Sequence[str], values: Sequence[str]
) -> list[tuple[str, ...]]:
    """Facts in the order in which they are asked for."""
    if facts > len(keys) or (task == "copy" and facts * span > len(values)):
        raise ValueError(f"{facts} facts need more words than the {len(keys)} keys and {len(values)} values")
    names = rng.sample(keys, facts)
    if task == "chase":
        return [(k, after, END) for k, after in zip(names, names[1:] + names[:1], strict=True)]
    if task == "recall":
        return [(k, rng.choice(values), END) for k in names]
    # No symbol occurs twice, so that the next one is determined by the last.
    symbols = rng.sample(values, facts * span)
    return [(k, *symbols[i * span : (i + 1) * span], END) for i, k in enumerate(names)]


def _moved(order: list[int], target: float, length: int) -> list[int]:
    """`order` with item 0 where its start in tokens is nearest to `target` (the first such place)."""
    rest = [i for i in order if i != 0]
    starts = [0]
    for item in rest:
        starts.append(starts[-1] + (1 if item < 0 else length))
    at = min(range(len(starts)), key=lambda i: abs(starts[i] - target))
    return [*rest[:at], 0, *rest[at:]]
