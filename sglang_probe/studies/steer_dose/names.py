"""Names of the runs and of their requests, by which recording and reading find each other."""

from __future__ import annotations

from dataclasses import dataclass

SELECTION, FORCED, FREE = "selection", "forced", "free"
"""The runs: candidates of features; every arm teacher-forced, on both kinds of text; every arm going on by itself."""
TEXT, NEUTRAL = "text", "neutral"
PLAIN = "=plain"
"""The arm that nothing is done to: no arm of a YAML has such a name."""


@dataclass(frozen=True, order=True)
class Place:
    """What one request is."""

    text: str
    scope: str
    """`TEXT` or `NEUTRAL`."""
    arm: str
    what: str
    """Name of the vector, or number of the prefix; of the plain arm `-`."""
    dose: int
    """Number of the dose in the arm's list, from 1; 0 is none."""

    @property
    def rid(self) -> str:
        """The id of the request."""
        return f"{self.scope}/{self.arm}/{self.what}/{self.dose}/{self.text}"

    @classmethod
    def of(cls, rid: str) -> Place:
        """What an id says. Neither arms nor vectors have a slash in their names; texts may."""
        scope, arm, what, dose, text = rid.split("/", 4)
        return cls(text, scope, arm, what, int(dose))
