"""An axis by a regular expression, matched against the decoded text of each request.

A token is of the class of the first match that it overlaps: the name of the group that matched (`(?P<year>\\d{4})`), or
`match` in an expression without named groups; else `other`. Special tokens are text like any other, spelled as they
are. Matching is Python's `re` on one request at a time: about a million tokens a second.
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np

from sglang_probe.axes.axis import UNKNOWN, Axis
from sglang_probe.axes.batch import Array, Batch
from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError

MATCH, OTHER = "match", "other"


class Pattern(Axis):
    """Classes by a regular expression.

    Raises (on construction):
        ConfigError: the expression cannot be compiled.
    """

    needs_ids = True

    def __init__(self, name: str, expression: str, vocabulary: Vocabulary) -> None:
        try:
            self._expression = re.compile(expression)
        except re.error as e:
            raise ConfigError(f"axis `{name}`: `{expression}` is not a regular expression: {e}") from e
        groups = sorted(self._expression.groupindex, key=self._expression.groupindex.__getitem__)
        super().__init__(name, [*(groups or [MATCH]), OTHER, UNKNOWN])
        self._code = {group: i for i, group in enumerate(groups)}
        self._pieces = vocabulary.pieces
        self._lengths = np.array([len(p) for p in vocabulary.pieces] + [0])

    def labels(self, batch: Batch) -> Array:
        """See `Axis`."""
        codes = np.full(len(batch), len(self.classes) - 2, dtype=np.uint16)
        known = (batch.ids >= 0) & (batch.ids < len(self._pieces))
        ids = np.where(known, batch.ids, len(self._pieces))
        pieces = [*self._pieces, b""]
        for start, end in pairwise(batch.offsets.tolist()):
            self._match(codes[start:end], ids[start:end], b"".join([pieces[i] for i in ids[start:end].tolist()]))
        codes[~known] = len(self.classes) - 1
        return codes

    def _match(self, codes: Array, ids: Array, raw: bytes) -> None:
        # A token may end within a character; `surrogateescape` keeps the bytes of torn characters apart.
        text = raw.decode("utf-8", "surrogateescape")
        ends = np.cumsum(self._lengths[ids])
        for match in reversed(list(self._expression.finditer(text))):  # the first match has the last word
            a, b = match.span()
            code = self._code.get(match.lastgroup or "", None if self._code else 0)
            if a == b or code is None:
                continue
            if len(text) != len(raw):
                a = len(text[:a].encode("utf-8", "surrogateescape"))
                b = a + len(match[0].encode("utf-8", "surrogateescape"))
            first = int(np.searchsorted(ends, a, side="right"))
            last = int(np.searchsorted(ends, b, side="left"))
            codes[first : last + 1] = code
