"""Axis `lexical`: what kind of text a token is. A table over the vocabulary, so a token's neighbours do not count.

`word start` is a word with a space before it. A word at the beginning of a line has none in most vocabularies and is a
`word piece`, like the middle of a word.
"""

from __future__ import annotations

import keyword
import re

import numpy as np

from sglang_probe.axes.axis import UNKNOWN, Axis
from sglang_probe.axes.batch import Array, Batch
from sglang_probe.axes.vocabulary import Vocabulary

SPECIAL, BYTE, NON_ASCII, NEWLINE, SPACE = "special", "byte fallback", "non-ASCII", "newline", "whitespace"
DIGIT, KEYWORD, IDENTIFIER = "digit", "keyword", "identifier"
WORD_START, WORD_PIECE, PUNCTUATION, MIXED = "word start", "word piece", "punctuation", "mixed"
CLASSES = [
    WORD_START,
    WORD_PIECE,
    KEYWORD,
    IDENTIFIER,
    DIGIT,
    PUNCTUATION,
    SPACE,
    NEWLINE,
    NON_ASCII,
    BYTE,
    SPECIAL,
    MIXED,
    UNKNOWN,
]
_CODE_NAME = re.compile(r"(?=.*(_|\d|[a-z][A-Z]))[A-Za-z_]\w*", re.ASCII)
_KEYWORDS = frozenset(keyword.kwlist)


class Lexical(Axis):
    """Kinds of text; see `kind_of`."""

    needs_ids = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__("lexical", list(CLASSES))
        kinds = [
            kind_of(piece, special=bool(special), fallback=bool(fallback))
            for piece, special, fallback in zip(vocabulary.pieces, vocabulary.special, vocabulary.fallback, strict=True)
        ]
        # The last entry is for unknown tokens (-1) and those beyond the vocabulary.
        self._table = np.array([CLASSES.index(k) for k in [*kinds, UNKNOWN]], dtype=np.uint16)

    def labels(self, batch: Batch) -> Array:
        """See `Axis`."""
        beyond = len(self._table) - 1
        ids = batch.ids
        if len(ids) and (ids.min() < 0 or ids.max() > beyond):
            ids = np.where((ids < 0) | (ids > beyond), beyond, ids)
        return self._table[ids]


def kind_of(piece: bytes, *, special: bool = False, fallback: bool = False) -> str:
    """The lexical class of a token by its bytes.

    `keyword` is one of Python's; `identifier` a name that only code has: with an underscore, a digit or an inner
    capital; `mixed` is everything that is several of these.
    """
    if special:
        return SPECIAL
    if fallback:
        return BYTE
    if not piece:
        return UNKNOWN
    text = piece.decode()
    if text.isspace():
        return NEWLINE if "\n" in text else SPACE
    if not text.isascii():
        return NON_ASCII
    word = text.lstrip()
    if word.rstrip() in _KEYWORDS:
        return KEYWORD
    if word.isdigit():
        return DIGIT
    if word.isalpha():
        return IDENTIFIER if _CODE_NAME.fullmatch(word) else WORD_START if text[0].isspace() else WORD_PIECE
    if _CODE_NAME.fullmatch(word) and any(c.isalpha() for c in word):
        return IDENTIFIER
    if not any(c.isalnum() for c in word):
        return PUNCTUATION
    return MIXED
