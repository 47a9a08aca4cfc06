"""Alarms on single trajectories and on the stream, and the drift log of its segments."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.monitor.conformal import e_values

Array = np.ndarray[Any, Any]


LONGEST = 100_000
"""Trajectories of a stream that later ones are ranked among; then its detectors begin anew with the reference alone,
which bounds what a server remembers. The rate of false alarms is per trajectory and stays what it is."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is said of one trajectory; S statistics."""

    place: int
    """In the stream, from 0."""
    statistic: int
    """Number of its most unusual one."""
    score: float
    p: float
    """Of that statistic, times the number of statistics."""
    alarm: bool
    p_S: Array
    """Of each statistic, against the reference and all earlier trajectories."""
    level_S: Array
    """Of each detector, as a share of what alarms."""
    drifted_S: Array
    """bool: those that reached 1 with this trajectory, for the first time."""


class Judge:
    """Judges trajectories one after the other: a recorded stream and one that is being served by the same code.

    Each statistic has a detector of its own, with its part of the rate: evidence of statistics that depend on each
    other may not be averaged trajectory by trajectory, because each is valid only given its own past.

    Args:
        reference_RS: scores of the trajectories that nothing was fitted to.
        share: of trajectories that may alarm falsely, over all statistics together.
        rate: of the stream: false alarms come within T trajectories with a chance of at most `rate * T`, over all
            statistics together.
        longest: see `LONGEST`.
    """

    def __init__(self, reference_RS: Array, *, share: float, rate: float, longest: int = LONGEST) -> None:
        reference = np.asarray(reference_RS, dtype=np.float64)
        self.share, self.rate, self._longest = share, rate, longest
        self._count = reference.shape[1]
        self._reference = [sorted(x for x in column if not np.isnan(x)) for column in reference.T.tolist()]
        self._references = len(reference)
        self.place = 0
        """Trajectories judged."""
        self.since_S = np.full(self._count, -1, dtype=np.int64)
        """Place at which each detector alarmed first; -1: it has not."""
        self.highest_S = np.zeros(self._count)
        """Of each detector, as a share of what alarms."""
        self._begin()

    @property
    def references(self) -> int:
        """Trajectories of the reference."""
        return self._references

    @property
    def statistics(self) -> int:
        """Statistics of a trajectory."""
        return self._count

    @property
    def least(self) -> float:
        """The least p that a trajectory can have."""
        return min(1 / (self._references + 1) * self._count, 1.0)

    @property
    def can_alarm(self) -> bool:
        """Whether a trajectory that is farther out than the whole reference alarms."""
        return self.least <= self.share

    def _begin(self) -> None:
        self._earlier = [list(column) for column in self._reference]
        self._seen = 0
        self._detector_S = np.zeros(self._count)

    def judge(self, scores_S: Array) -> Verdict:
        """Judge the next trajectory; a score that is not a number is usual."""
        if self._seen >= self._longest:
            self._begin()
        single, sequential = np.ones(self._count), np.ones(self._count)
        for j, x in enumerate(np.asarray(scores_S, dtype=np.float64).tolist()):
            if x != x:
                continue
            ordered, earlier = self._reference[j], self._earlier[j]
            single[j] = (1 + len(ordered) - bisect_left(ordered, x)) / (self._references + 1)
            sequential[j] = (1 + len(earlier) - bisect_left(earlier, x)) / (self._references + self._seen + 1)
            insort(earlier, x)
        self._seen += 1
        # An alarm long past says nothing more by growing until it overflows.
        self._detector_S = np.minimum((self._detector_S + 1) * e_values(sequential), 1e300)
        level = self._detector_S * self.rate / self._count
        drifted = (level >= 1) & (self.since_S < 0)
        self.since_S[drifted] = self.place
        self.highest_S = np.maximum(self.highest_S, level)
        least = int(single.argmin())
        p = min(float(single[least]) * self._count, 1.0)
        verdict = Verdict(self.place, least, float(scores_S[least]), p, p <= self.share, sequential, level, drifted)
        self.place += 1
        return verdict


@dataclass(frozen=True)
class Alarms:
    """What was found in a stream of trajectories."""

    trajectories: pd.DataFrame
    """Of each: `place` (in the stream, from 0), `statistic` (its most unusual), `score`, `p` (of that statistic, times
    the number of statistics), `alarm`."""
    stream: pd.DataFrame
    """Of each statistic and trajectory: `place`, `statistic`, `detector` (R, as a share of what alarms), `p`."""
    drift: pd.DataFrame
    """Of each statistic: `statistic`, `first_alarm` (place; null: none), `highest` (largest share of what alarms)."""


def alarms(scores: pd.DataFrame, reference: pd.DataFrame, *, share: float, rate: float) -> Alarms:
    """Judge a recorded stream.

    Args:
        scores: of its trajectories in their order, a column a statistic (`Profile.scores`). reference: of the profile.
        share, rate: as of `Judge`.
    """
    names, k = list(scores.columns), scores.shape[1]
    judge = Judge(reference[names].to_numpy(np.float64), share=share, rate=rate)
    verdicts = [judge.judge(x) for x in scores.to_numpy(np.float64)]
    at = np.arange(len(verdicts))
    trajectories = pd.DataFrame(
        {
            "place": at,
            "statistic": np.array(names, dtype=object)[[v.statistic for v in verdicts]] if len(at) else [],
            "score": [v.score for v in verdicts],
            "p": [v.p for v in verdicts],
            "alarm": np.array([v.alarm for v in verdicts], dtype=bool),
        }
    )
    level, p = (np.array([getattr(v, name) for v in verdicts]).reshape(len(at), k).T for name in ("level_S", "p_S"))
    stream = pd.DataFrame(
        {
            "place": np.tile(at, k),
            "statistic": np.repeat(names, len(at)),
            "detector": level.ravel(),
            "p": p.ravel(),
        }
    )
    first = [int(n) if n >= 0 else None for n in judge.since_S]
    drift = pd.DataFrame(
        {"statistic": names, "first_alarm": pd.array(first, dtype="Int64"), "highest": judge.highest_S}
    )
    return Alarms(trajectories, stream, drift)


def drift_log(found: Alarms, segments: pd.Series, share: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One line per segment of the stream, and the events.

    Args:
        segments: name of the segment of each trajectory, in the order of the stream.

    Returns:
        `segment, trajectories, alarms, expected_at_most, statistic, detector, drift` (the statistic whose detector
        stood highest in it), and events `event, segment, place, statistic, evidence`: a detector that alarmed asks for
        a look, and perhaps for another training. Nothing is trained by it.
    """
    rows = []
    stream = found.stream.assign(segment=segments.to_numpy()[found.stream["place"]])
    for name in dict.fromkeys(segments):
        mine = found.trajectories[(segments == name).to_numpy()]
        top = stream[stream["segment"] == name].sort_values("detector").iloc[-1]
        rows.append(
            {
                "segment": name,
                "trajectories": len(mine),
                "alarms": int(mine["alarm"].sum()),
                "expected_at_most": share * len(mine),
                "statistic": top["statistic"],
                "detector": float(top["detector"]),
                "drift": bool(top["detector"] >= 1),
            }
        )
    events = [
        {
            "event": "retrain",
            "segment": segments.iloc[int(r.first_alarm)],
            "place": int(r.first_alarm),
            "statistic": r.statistic,
            "evidence": f"detector at {r.highest:.3g} times what alarms",
        }
        for r in found.drift.itertuples()
        if not pd.isna(r.first_alarm)
    ]
    return pd.DataFrame(rows), pd.DataFrame(events, columns=["event", "segment", "place", "statistic", "evidence"])
