"""Source `documents`: plain text that people wrote, without a chat template."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from sglang_probe.config import CorpusPath
from sglang_probe.errors import WorkloadError
from sglang_probe.workload.corpus import is_held_out, load_corpus
from sglang_probe.workload.rendering import Rendering
from sglang_probe.workload.request import Conversation, Segment
from sglang_probe.workload.sources import SourceReport


class Documents(Rendering):
    """Excerpts of a corpus, each from another document."""

    source: Literal["documents"] = "documents"
    count: int = Field(default=64, ge=1)
    """Number of requests."""
    chars: int = Field(default=1500, ge=1)
    """Length of an excerpt. It begins at a line, drawn at random from those that leave room."""
    corpus: CorpusPath = "stdlib"
    """`stdlib` (Python's standard library), or a file or folder of `.py`, `.txt`, `.md` and `.rst` files; in a YAML
    file relative to that file."""
    held_out: bool = False
    """Only documents that the built-in model was not trained on."""
    seed: int = 0
    """Seed of the choice of documents and excerpts."""

    def conversations(self, report: SourceReport) -> Iterator[Conversation]:
        """The excerpts, in an order drawn by the seed.

        Raises:
            WorkloadError: too few documents are long enough.
        """
        corpus = load_corpus(self.corpus)
        report.corpus_digest = corpus.digest
        rng = random.Random(self.seed)
        fitting = [d for d in corpus.documents if len(d.text) >= self.chars and (is_held_out(d) or not self.held_out)]
        if len(fitting) < self.count:
            raise WorkloadError(
                f"{len(fitting)} documents of `{self.corpus}` have {self.chars} characters, not {self.count}",
                fix="lower `count` or `chars`, or set `held_out: false`",
            )
        for document in rng.sample(fitting, self.count):
            text = document.text
            lines = [0] + [i + 1 for i, c in enumerate(text[: len(text) - self.chars]) if c == "\n"]
            start = rng.choice([i for i in lines if i + self.chars <= len(text)])
            yield Conversation((Segment("document", text[start : start + self.chars]),), family=document.path)
