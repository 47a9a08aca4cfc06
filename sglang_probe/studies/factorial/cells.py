"""The cells of the content-by-position factorial: what the pseudo tokens say, and where they are said to stand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

REAL, SHIFTED, RESAMPLED, OTHER = "real", "shifted", "resampled", "other"
PROMPT, FILLER, RANDOM = "prompt", "filler", "random"
CONTENTS = (REAL, SHIFTED, RESAMPLED, OTHER, PROMPT, FILLER, RANDOM)
"""The true continuation; the same some tokens later; another continuation that the model sampled; the true continuation
of another prompt; the first and last prompt tokens, as DapQ's pseudo tokens are; a sentence that has nothing to do with
the prompt; random tokens of the vocabulary. How far apart they are is measured, not taken from this order."""
LATER = 8
"""Tokens by which `shifted` is later, where so many were decoded."""

TRUE, ZERO = "true", "zero"
SHIFTS = {TRUE: 0, "+1": 1, "+8": 8, "+32": 32, "+128": 128}
POSITIONS = (*SHIFTS, ZERO)
"""Where the true continuation stands (L, L + 1, ...), the same shifted, and 0, 1, ..."""


@dataclass(frozen=True)
class Cell:
    """One treatment of one request."""

    content: str
    position: str

    def rid(self, rid: str) -> str:
        """Id of the request that runs it."""
        return f"{rid}.{self.content}.{self.position}"

    def start(self, length: int) -> int:
        """RoPE position of the first pseudo token after a prompt of `length`."""
        return 0 if self.position == ZERO else length + SHIFTS[self.position]


def all_cells() -> list[Cell]:
    """Every content at every position."""
    return [Cell(c, p) for c in CONTENTS for p in POSITIONS]


def later(continuation: Sequence[int], count: int) -> list[int]:
    """`count` tokens of a continuation, `LATER` tokens in, or as far in as it reaches."""
    start = max(0, min(LATER, len(continuation) - count))
    return list(continuation[start : start + count])


def prompt_ends(prompt: Sequence[int], count: int, first: int) -> list[int]:
    """The first `first` and the last `count - first` tokens of a prompt (DapQ: 4 and 28)."""
    first = min(first, count)
    rest = count - first
    return [*prompt[:first], *prompt[len(prompt) - rest :]] if rest else list(prompt[:first])


def repeated(tokens: Sequence[int], count: int) -> list[int]:
    """`count` tokens of a sentence said again and again."""
    return [tokens[i % len(tokens)] for i in range(count)]


def random_tokens(vocabulary: Sequence[int], count: int, seed: str) -> list[int]:
    """Tokens drawn evenly; the same for the same seed."""
    return random.Random(seed).choices(vocabulary, k=count)
