"""Names of the runs and of their requests, by which recording and reading find each other."""

from __future__ import annotations

from sglang_probe.studies.steer_decay.statistics import HUMAN, OWN

DECODED, FORCED, FREE, REREAD = "decoded", "forced", "free", "reread"
"""The runs: the model's own continuation; every arm teacher-forced; every arm going on by itself; and what it wrote
there as a prompt, without steering."""
PLAIN, NOTHING = "=plain", "=zero"
"""Arms that are no vector: no vector of a library has such a name."""
SOURCES = {"own": OWN, "human": HUMAN}


def rid_of(text: str, source: str, arm: str, onset: int) -> str:
    """The id of a request."""
    return f"{source}/{onset}/{arm}/{text}"


def named(rid: str) -> tuple[str, str, str, int]:
    """Text, source, arm (a vector's name, or one of `PLAIN` and `NOTHING`) and onset (0: none) that an id says."""
    source, onset, arm, text = rid.split("/", 3)
    return text, source, arm, int(onset)
