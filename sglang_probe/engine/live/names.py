"""Names in the ledger. Clients choose request ids: any string, and the same one as often as they like.

A name is the id itself, so that users find their requests, unless that could be mistaken for another request's. The
second request with an id is `<id>~1`, and so on. A `~` of the id's own is doubled, so that no id can spell a name that
was made, nor the other way round: in a name a single `~` is always the probe's.

| in a name | stands for |
|---|---|
| `~~` | a `~` of the id |
| `~<n>` at the end | the n-th further request with that id |
| `~u<4 digits>` | half of a surrogate pair, which no file can hold |
| `~h<32 digits>` | the rest of an id that is too long, as a hash |
| `~0` alone | the empty id |

A name is given again only when nothing can refer to it any more: neither this segment nor the one before, no request in
flight, and no entry that the lineage remembers. That bounds the memory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable

_LONGEST = 256
_UNWRITABLE = re.compile("[~\ud800-\udfff]")


class Names:
    """Gives requests their names in the ledger. Used by the scheduler thread, but for `new_segment`.

    Args:
        remembered: whether something outside, such as the lineage, still refers to a name.
    """

    def __init__(self, remembered: Callable[[str], bool] = lambda _name: False) -> None:
        self.remembered = remembered
        self._used: set[str] = set()
        self._used_before: set[str] = set()
        self._again: dict[str, int] = {}  # where to look for the next free number: saves time, decides nothing
        self._again_before: dict[str, int] = {}

    def name(self, rid: str) -> str:
        """A name for a new request with this id, which no other request can be mistaken for."""
        base = name = escaped(rid)
        if self._taken(name):
            n = max(self._again.get(base, 0), self._again_before.get(base, 0)) + 1
            stem = "" if base == _EMPTY else base
            while self._taken(name := f"{stem}~{n}"):
                n += 1
            self._again[base] = n
        self._used.add(name)
        return name

    def new_segment(self, taken: Iterable[str]) -> None:
        """Another segment begins; `taken` are names that reach into it."""
        self._used_before, self._used = self._used, set(taken)
        self._again_before, self._again = self._again, {}

    def _taken(self, name: str) -> bool:
        return name in self._used or name in self._used_before or self.remembered(name)


_EMPTY = "~0"


def escaped(rid: str) -> str:
    """The name of the first request with an id; different for different ids, and never one with a number."""
    if not rid:
        return _EMPTY
    if len(rid) > _LONGEST:
        digest = hashlib.blake2b(rid.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return f"{_escape(rid[: _LONGEST // 2])}~h{digest}"
    return _escape(rid)


def _escape(rid: str) -> str:
    return _UNWRITABLE.sub(_told, rid)


def _told(found: re.Match[str]) -> str:
    char = found[0]
    return "~~" if char == "~" else f"~u{ord(char):04x}"
