"""Source `answers`: questions with one right answer in real prose, for any model that reads English.

    {"source": "answers", "task": "needle", "count": 24, "prompt_tokens": 400, "distractors": 2}
    {"source": "answers", "task": "lookup", "count": 24, "prompt_tokens": 400, "distractors": 9, "examples": 2}

The prompt is prose of a corpus with facts in it, and then a question, which is the beginning of one of the facts. The
right answer is what that fact goes on with: words or digits drawn at random, so that nothing but the fact says them.

    <prose> The secret words of Oslo are lemon castle drum. <prose> ... The secret words of Oslo are| lemon castle drum.

Every request knows its answer as token ids, where the prompt holds it (labels of the axis `holds`, and
`Truth.needed_content`), and where the question begins (`Truth.context_len`). Which positions a model reads is another
matter: `sglang-probe evict` finds them by removal (`needed: true`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sglang_probe.config import CorpusPath
from sglang_probe.errors import WorkloadError
from sglang_probe.workload.corpus import load_corpus
from sglang_probe.workload.render import Renderer
from sglang_probe.workload.rendering import Rendering
from sglang_probe.workload.request import Conversation, Label, Rendered, Segment, Truth
from sglang_probe.workload.sources import SourceReport

HOLDS = "holds"
"""Axis of the labels over the facts: `key` and `value` of the fact that is asked for, `other` values."""

_KEYS = """
Paris London Berlin Madrid Rome Vienna Prague Lisbon Athens Dublin Oslo Warsaw Cairo Delhi Tokyo Seoul Lima Kyoto
Havana Boston Chicago Denver Dallas Miami Seattle Toronto Montreal Sydney Melbourne Moscow Munich Hamburg Geneva
Zurich Milan Venice Naples Florence Barcelona Stockholm Copenhagen Brussels Budapest Istanbul Beijing Shanghai
Singapore Houston
"""
KEYS = tuple(_KEYS.split())
"""What facts are about."""
_WORDS = """
river stone amber cloud table garden silver window forest candle bridge mountain paper basket mirror hammer
violin rocket pillow tiger monkey eagle salmon turtle rabbit spider dragon castle tower village market harbor
island desert valley ocean planet engine wheel copper iron gold marble cotton leather button needle thread
pocket jacket lemon cherry banana pepper garlic onion carrot potato butter cheese honey sugar coffee bottle
spoon knife plate dinner winter summer shadow crystal diamond pearl feather guitar piano drum doctor teacher
farmer sailor soldier pilot painter writer singer hunter king queen prince knight giant school library church
hospital hotel theater museum station airport highway tunnel fountain statue beach cave pond
"""
WORDS = tuple(_WORDS.split())
"""What values are made of."""
_STEM = {"words": "The secret words of {key} are", "digits": "The secret number of {key} is"}
_LINE_CHARS = 160
_TRIES = 16


class Answers(Rendering):
    """Facts in prose, and a question whose answer one of them holds."""

    source: Literal["answers"] = "answers"
    task: Literal["needle", "lookup"] = "needle"
    """`needle`: facts stand apart, between sentences of prose; `lookup`: they are one list, which prose precedes."""
    count: int = Field(default=24, ge=1)
    """Number of requests."""
    seed: int = 0
    """Seed of facts, places and prose."""
    prompt_tokens: int = Field(default=400, ge=32)
    """Length of every prompt, question included. What the facts leave is prose."""
    values: Literal["words", "digits"] = "words"
    """What a value is: common English words, or a number. Guessing has one word of 109 right, one digit of 10."""
    value_length: int = Field(default=3, ge=2)
    """Words or digits of a value."""
    distractors: int = Field(default=2, ge=0)
    """Facts that are not asked for."""
    examples: int = Field(default=0, ge=0)
    """How many of these the question repeats before it asks, to show what is wanted. They belong to the question."""
    depth: list[Annotated[float, Field(ge=0, le=1)]] | None = None
    """Where the fact that is asked for stands, taken in turn by the requests: 0 first, 1 last; by default anywhere."""
    corpus: CorpusPath = "stdlib"
    """Where the prose comes from: the docstrings of `stdlib` (Python's standard library), or of a file or folder of
    Python files; in a YAML file relative to that file."""

    @model_validator(mode="after")
    def _has_enough(self) -> Answers:
        if self.distractors >= len(KEYS):
            raise ValueError(f"`distractors: {self.distractors}`: there are names for {len(KEYS) - 1} at most")
        if self.examples > self.distractors:
            raise ValueError(f"`examples: {self.examples}` are taken from the `distractors`, and there are fewer")
        if self.values == "words" and self.value_length > len(WORDS):
            raise ValueError(f"`value_length: {self.value_length}`: there are {len(WORDS)} words")
        return self

    def conversations(self, report: SourceReport, renderer: Renderer) -> Iterator[Conversation]:
        """One plain prompt for each request, of exactly `prompt_tokens`. Nothing is shared by design.

        Raises:
            WorkloadError: facts and question alone are longer than the prompt, the corpus has too little prose, or the
                tokenizer joins the question and the answer in one token.
        """
        report.corpus_digest, sentences = _prose(self.corpus)
        if not sentences:
            raise WorkloadError(f"corpus `{self.corpus}` has no docstrings to make prose of", fix="use `stdlib`")
        for index in range(self.count):
            yield self._conversation(index, sentences, renderer)

    def _conversation(self, index: int, sentences: Sequence[str], renderer: Renderer) -> Conversation:
        """Request `index`: it depends on the seed, the index and the shape, on no other request."""
        rng = random.Random(f"{self.seed}/{self.task}/{index}")
        drawn = _Facts.draw(self, rng, self.depth[index % len(self.depth)] if self.depth else None)
        segments = self._fitted(drawn, rng, sentences, renderer)
        prompt = renderer.render(Conversation(segments))
        truth = _truth(self, drawn, segments, prompt, renderer)
        sampling: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
        sampling["max_new_tokens"] = len(truth.continuation_ids)
        return Conversation((), None, sampling, truth, rendered=prompt)

    def _fitted(
        self, drawn: _Facts, rng: random.Random, sentences: Sequence[str], renderer: Renderer
    ) -> tuple[Segment, ...]:
        """The prompt with prose enough for `prompt_tokens`; other prose where some passes over that very number."""
        for _ in range(_TRIES):
            prose = "\n".join(rng.choice(sentences) for _ in range(1 + self.prompt_tokens // 4))
            found = _cut(drawn, prose, self.prompt_tokens, renderer)
            if found is not None:
                return found
        raise WorkloadError(
            f"no prompt of exactly {self.prompt_tokens} tokens is found", fix="use another `seed` or `prompt_tokens`"
        )


@dataclass(frozen=True)
class _Facts:
    """The facts of a prompt, the one that is asked for first."""

    scattered: bool
    stem: str
    keys: tuple[str, ...]
    values: tuple[str, ...]
    """Each begins with a space."""
    places: tuple[float, ...]
    """Where each fact stands, as a fraction of the prose, or of the list."""
    examples: tuple[int, ...]

    @staticmethod
    def draw(config: Answers, rng: random.Random, depth: float | None) -> _Facts:
        many = config.distractors + 1
        values = tuple(_value(config, rng) for _ in range(many))
        places = [rng.random() for _ in range(many)]
        if depth is not None:
            places[0] = depth
        return _Facts(
            config.task == "needle",
            _STEM[config.values],
            tuple(rng.sample(KEYS, many)),
            values,
            tuple(places),
            tuple(rng.sample(range(1, many), config.examples)),
        )

    @property
    def depth(self) -> float:
        """Where the fact that is asked for stands among all, or in the prose."""
        if self.scattered:
            return self.places[0]
        return sum(p < self.places[0] for p in self.places[1:]) / max(1, len(self.places) - 1)

    def segments(self, filler: str) -> tuple[Segment, ...]:
        """The prompt with so much prose."""
        lines = [Segment("filler", line + "\n") for line in filler.split("\n") if line]
        order = sorted(range(len(self.keys)), key=lambda i: (self.places[i], i))
        at = [round(self.places[i] * len(lines)) if self.scattered else len(lines) for i in order]
        for i, place in reversed(list(zip(order, at, strict=True))):
            lines.insert(place, self._fact(i))
        asked = "".join(self._sentence(i) + "\n" for i in self.examples) + self.stem.format(key=self.keys[0])
        return (*lines, Segment("filler", "\n"), Segment("question", asked))

    def _sentence(self, i: int) -> str:
        return f"{self.stem.format(key=self.keys[i])}{self.values[i]}."

    def _fact(self, i: int) -> Segment:
        text = self._sentence(i) + "\n"
        value = text.index(self.values[i])
        held = Label(HOLDS, "other" if i else "value", value, value + len(self.values[i]))
        key = self.stem.index("{key}")
        labels = (held,) if i else (Label(HOLDS, "key", key, key + len(self.keys[0])), held)
        return Segment("distractor" if i else "fact", text, labels=labels)


def _value(config: Answers, rng: random.Random) -> str:
    if config.values == "digits":
        return " " + rng.choice("123456789") + "".join(rng.choice("0123456789") for _ in range(config.value_length - 1))
    return " " + " ".join(rng.sample(WORDS, config.value_length))


@cache
def _prose(corpus: str) -> tuple[str, tuple[str, ...]]:
    """Digest and sentences of a corpus. Tasks of a study share it, and the standard library takes seconds to parse."""
    found = load_corpus(corpus)
    docs = [re.sub(r"\s+", " ", f.doc).strip() for f in found.functions]
    return found.digest, tuple(s for doc in docs for s in re.split(r"(?<=[.:;]) ", doc) if 20 <= len(s) <= _LINE_CHARS)


def _cut(drawn: _Facts, prose: str, tokens: int, renderer: Renderer) -> tuple[Segment, ...] | None:
    """The prompt with as many characters of prose as give `tokens`.

    Tokens grow with the characters, but for a merge here and there: a search finds about where, and the nearest number
    that fits to the token is taken; None if there is none.
    """

    def length(chars: int) -> int:
        return len(renderer.render(Conversation(drawn.segments(prose[:chars]))).prompt_ids)

    if (least := length(0)) > tokens:
        raise WorkloadError(
            f"facts and question alone have {least} tokens, and `prompt_tokens` is {tokens}",
            fix="raise `prompt_tokens`, or have fewer `distractors` or `examples`",
        )
    low, high = 0, len(prose)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(middle) <= tokens else (low, middle - 1)
    for chars in sorted(range(max(0, low - 40), min(len(prose), low + 40) + 1), key=lambda c: abs(c - low)):
        if length(chars) == tokens:
            return drawn.segments(prose[:chars])
    return None


def _truth(
    config: Answers, drawn: _Facts, segments: tuple[Segment, ...], prompt: Rendered, renderer: Renderer
) -> Truth:
    whole = renderer.render(Conversation((*segments, Segment("answer", drawn.values[0]), Segment("end", "."))))
    length = len(prompt.prompt_ids)
    if whole.prompt_ids[:length] != prompt.prompt_ids:
        raise WorkloadError(
            "the tokenizer joins the end of the question and the beginning of the answer in one token",
            fix="use a model whose tokens do not reach over a space between words",
        )
    continuation = whole.prompt_ids[length:]
    answered = [p - length for s in whole.spans if s.name == "answer" for p in range(s.start, s.end)]
    # The space before digits is a token of its own in some tokenizers, and says nothing.
    steps = tuple(t for t in answered if renderer.text_of([continuation[t]]).strip())
    held = next(x for x in prompt.labels if x.name == "value")
    positions = tuple(range(held.start, held.end))
    aligned = len(positions) == len(answered) and answered == list(range(len(answered)))
    return Truth(
        task=config.task,
        prompt_ids=prompt.prompt_ids,
        context_len=next(s.start for s in prompt.spans if s.name == "question"),
        continuation_ids=continuation,
        answer_ids=tuple(continuation[t] for t in steps),
        answer_steps=steps,
        # What the answer's query names is the token before it.
        needed_content=tuple((positions[t] - 1, positions[t]) if aligned else positions for t in steps),
        needed_causal=None,
        depth=drawn.depth,
    )
