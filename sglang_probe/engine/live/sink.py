"""What a recorder hands over, on its way into a live recording."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_probe.engine.ledger.facts import Commit
from sglang_probe.run import schema

if TYPE_CHECKING:
    from sglang_probe.engine.live.recording import LiveRecording

_ROW_START = schema.SPANS.get_field_index("row_start")
_FORWARD_ROW_START = schema.FORWARDS.get_field_index("row_start")


class Sink:
    """`LiveRecording.put` for the recorder of one epoch."""

    def __init__(self, live: LiveRecording, epoch: int) -> None:
        self._live, self._epoch = live, epoch

    def put(self, commit: Commit) -> None:
        """See `LiveRecording.put`."""
        self._live.put(commit, self._epoch)


def rebase(commit: Commit, base: int) -> None:
    """Number rows from the start of the segment."""
    i = _ROW_START
    commit.spans = [(*s[:i], s[i] - base, *s[i + 1 :]) if s[i] >= 0 else s for s in commit.spans]
    if commit.forward is not None and commit.forward[_FORWARD_ROW_START] >= 0:
        f, j = commit.forward, _FORWARD_ROW_START
        commit.forward = (*f[:j], f[j] - base, *f[j + 1 :])
