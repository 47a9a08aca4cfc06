"""Source `shared_prefix`: families of chats that share a beginning and differ in the question.

A family is a team working on one module of a corpus: a system prompt, a few exemplars (a function asked for, its
source answered), perhaps a document, and then a question of each request's own. This is the traffic in which a prefix
cache does most, and in which a harvest that does not account for it loses most.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from sglang_probe.config import CorpusPath
from sglang_probe.errors import WorkloadError
from sglang_probe.workload.corpus import Corpus, Function, load_corpus
from sglang_probe.workload.rendering import Rendering
from sglang_probe.workload.request import Conversation, Segment
from sglang_probe.workload.sources import SourceReport

# The phrasing that the built-in model is trained on (models/probe-text/train.py), with what a real prompt adds to it.
_INSTRUCTIONS = (
    "You write Python. Answer with the source of the function and nothing else. Keep the name, the arguments and "
    "their defaults exactly as they are asked for, and begin the body with the docstring."
)
_ABOUT = "You maintain the module `{module}`. Reply with code only. This is what the module is for: {summary}"
_SUMMARY_CHARS = 400


class SharedPrefix(Rendering):
    """Requests built from a corpus of Python source."""

    source: Literal["shared_prefix"] = "shared_prefix"
    families: int = Field(default=4, ge=1)
    """Groups of requests that share a prefix."""
    requests_per_family: int = Field(default=8, ge=1)
    """Requests of each group."""
    exemplars: int = Field(default=3, ge=0)
    """Worked examples before the question, shared by a family."""
    turns: int = Field(default=1, ge=1)
    """Requests of one conversation: each carries the earlier questions with their true answers."""
    document_chars: int = Field(default=0, ge=0)
    """Length of a document, shared by the family, that stands before the first question: source of the module."""
    order: Literal["interleaved", "grouped", "shuffled"] = "interleaved"
    """Order of requests: families in turn, one family after the other, or at random (turns keep their order)."""
    shared_system: bool = True
    """Whether all families share the beginning of the system prompt; if not, it begins with the family's own part."""
    corpus: CorpusPath = "stdlib"
    """`stdlib` (Python's standard library), or a file or folder of Python source; in a YAML file relative to that
    file."""
    seed: int = 0
    """Seed of the choice of modules and functions."""

    @model_validator(mode="after")
    def _whole_conversations(self) -> Self:
        if self.requests_per_family % self.turns:
            raise ValueError(
                f"`requests_per_family` ({self.requests_per_family}) must be a multiple of `turns` ({self.turns}): "
                "every conversation gives one request per turn"
            )
        return self

    def conversations(self, report: SourceReport) -> Iterator[Conversation]:
        """The requests in the configured order.

        Raises:
            WorkloadError: the corpus has too few functions, modules or characters.
        """
        corpus = load_corpus(self.corpus)
        report.corpus_digest = corpus.digest
        rng = random.Random(self.seed)
        threads = [
            thread for module in self._choose_modules(corpus, rng) for thread in self._family(corpus, module, rng)
        ]
        for i in self._schedule(rng):
            yield next(threads[i])

    @property
    def _threads_per_family(self) -> int:
        return self.requests_per_family // self.turns

    def _schedule(self, rng: random.Random) -> list[int]:
        """For each request in order, the conversation whose next turn it is; a family's conversations are adjacent."""
        per_family = self._threads_per_family
        grouped = [c for c in range(self.families * per_family) for _ in range(self.turns)]
        if self.order == "interleaved":
            return [i for k in range(self.requests_per_family) for i in grouped[k :: self.requests_per_family]]
        if self.order == "shuffled":
            rng.shuffle(grouped)
        return grouped

    def _choose_modules(self, corpus: Corpus, rng: random.Random) -> list[str]:
        """At random among the modules that can fill a family alone; failing these, the largest."""
        sizes: dict[str, int] = {}
        for f in _distinct(corpus.functions):
            sizes[f.module] = sizes.get(f.module, 0) + 1
        able = [m for m, size in sizes.items() if size > self.exemplars]
        if len(able) < self.families:
            raise WorkloadError(
                f"corpus `{self.corpus}` has {len(able)} modules with at least {self.exemplars + 1} documented "
                f"functions; {self.families} families need one each",
                fix="lower `families` or `exemplars`, or give a larger corpus of Python source",
            )
        rng.shuffle(able)
        able.sort(key=lambda m: -min(sizes[m], self.exemplars + self.requests_per_family))
        return able[: self.families]

    def _family(self, corpus: Corpus, module: str, rng: random.Random) -> list[Iterator[Conversation]]:
        functions = self._choose_functions(corpus, module, rng)
        exemplars, questions = functions[: self.exemplars], functions[self.exemplars :]
        prefix = [Segment("system", self._system_prompt(corpus, module), "system")]
        for f in exemplars:
            message = prefix[-1].message + 1
            prefix.append(Segment("exemplar", _ask(f), "user", message))
            prefix.append(Segment("exemplar", f.source, "assistant", message + 1))
        if self.document_chars:
            excerpt = _excerpt(corpus, module, self.document_chars)
            prefix.append(Segment("document", f"{excerpt}\n\n", "user", prefix[-1].message + 1))
        return [
            self._thread(module, prefix, questions[i : i + self.turns]) for i in range(0, len(questions), self.turns)
        ]

    def _thread(self, family: str, prefix: list[Segment], questions: Sequence[Function]) -> Iterator[Conversation]:
        """One conversation as its requests, each with the true answers of those before it."""
        segments = list(prefix)
        message = prefix[-1].message + (prefix[-1].name != "document")  # a document opens the question's message
        for f in questions:
            segments.append(Segment("user", _ask(f), "user", message))
            yield Conversation(tuple(segments), family)
            segments.append(Segment("assistant", f.source, "assistant", message + 1))
            message += 2

    def _choose_functions(self, corpus: Corpus, module: str, rng: random.Random) -> list[Function]:
        """Exemplars, then questions, no two alike: the module's own first, then others of the corpus."""
        needed = self.exemplars + self.requests_per_family
        own = [f for f in corpus.functions if f.module == module]
        others = [f for f in corpus.functions if f.module != module]
        rng.shuffle(own)
        rng.shuffle(others)
        functions = _distinct([*own, *others])[:needed]
        if len(functions) < needed:
            raise WorkloadError(
                f"corpus `{self.corpus}` has {len(functions)} different documented functions; a family needs {needed}",
                fix="lower `requests_per_family`, or give a larger corpus of Python source",
            )
        return functions

    def _system_prompt(self, corpus: Corpus, module: str) -> str:
        parts = [_INSTRUCTIONS, _ABOUT.format(module=module, summary=_summary(corpus, module))]
        return " ".join(parts if self.shared_system else reversed(parts))


def _ask(f: Function) -> str:
    return f"Write `{f.signature}`.\n{f.doc}"


def _distinct(functions: Sequence[Function]) -> list[Function]:
    """Without functions that would be asked for in the same words: such requests would not differ at all."""
    return list({_ask(f): f for f in reversed(functions)}.values())[::-1]


def _summary(corpus: Corpus, module: str) -> str:
    """First paragraph of the module's docstring, on one line."""
    text = next(d.text for d in corpus.documents if d.module == module)
    doc = ast.get_docstring(ast.parse(text)) or "its functions are documented one by one."
    return " ".join(doc.split("\n\n")[0].split())[:_SUMMARY_CHARS]


def _excerpt(corpus: Corpus, module: str, chars: int) -> str:
    """The beginning of the module's source, continued by the documents after it if it is too short."""
    first = next(i for i, d in enumerate(corpus.documents) if d.module == module)
    text = ""
    for d in (*corpus.documents[first:], *corpus.documents[:first]):
        text += d.text
        if len(text) >= chars:
            return text[:chars]
    raise WorkloadError(f"corpus `{corpus.name}` has fewer than {chars} characters", fix="lower `document_chars`")
