"""What is withheld, as a rule, and where it is found in tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field, field_validator

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.config import Config
from sglang_probe.privacy.detect import KINDS, Kind, find


class Withhold(Config):
    """What is withheld of a run."""

    pii: list[Kind] = Field(default_factory=lambda: list(KINDS), min_length=1)
    """Kinds of personal data; names and addresses are found by none of them."""
    neighbours: int = Field(default=1, ge=0, le=64)
    """Positions on either side whose rows are withheld too."""
    presidio: bool = False
    """Ask the pattern recognisers of presidio as well (the extra `pii`)."""

    @field_validator("pii")
    @classmethod
    def _once(cls, kinds: list[Kind]) -> list[Kind]:
        return list(dict.fromkeys(kinds))


def found_in(ids: Sequence[int], vocabulary: Vocabulary, rule: Withhold) -> list[tuple[int, int, str]]:
    """Positions `[start, end)` of what is found in a sequence of tokens, with its kind.

    Args:
        ids: those that are unknown (-1) end a piece of text.
    """
    text = [vocabulary.pieces[i] if 0 <= i < len(vocabulary) else b"\x00" for i in ids]
    ends = np.cumsum([len(piece) for piece in text])
    told = []
    # A character a byte, so that places in the text are places in the bytes. Patterns are of ASCII, and every other
    # byte is a character that is no letter: read as Latin-1, part of a curly quote is one, and hides what is beside it.
    for f in find(b"".join(text).decode("ascii", errors="replace"), rule.pii, presidio=rule.presidio):
        first = int(np.searchsorted(ends, f.start, side="right"))
        last = int(np.searchsorted(ends, f.end - 1, side="right"))
        told.append((first, last + 1, f"pii:{f.kind}"))
    return told
