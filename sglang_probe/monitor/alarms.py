"""Alarms on single trajectories and on the stream, and the drift log of its segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.monitor.conformal import e_values, p_values, sequential_p_values, shiryaev_roberts

Array = np.ndarray[Any, Any]


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
    """Judge a stream.

    Args:
        scores: of its trajectories in their order, a column a statistic (`Profile.scores`). reference: of the profile.
        share: of trajectories that may alarm falsely, over all statistics together.
        rate: of the stream: false alarms come within T trajectories with a chance of at most `rate * T`, over all
            statistics together.
    """
    names, k = list(scores.columns), scores.shape[1]
    x, ref = scores.to_numpy(np.float64), reference[names].to_numpy(np.float64)
    p = np.stack([p_values(x[:, j], ref[:, j]) for j in range(k)], axis=1)
    least = p.argmin(1)
    at = np.arange(len(x))
    single = np.minimum(p[at, least] * k, 1.0)
    trajectories = pd.DataFrame(
        {
            "place": at,
            "statistic": np.array(names, dtype=object)[least],
            "score": x[at, least],
            "p": single,
            "alarm": single <= share,
        }
    )
    # Each statistic has a detector of its own, with its part of the rate: evidence of statistics that depend on each
    # other may not be averaged trajectory by trajectory, because each is valid only given its own past.
    sequential = sequential_p_values(x.T, ref.T)
    level = shiryaev_roberts(e_values(sequential)) * rate / k
    stream = pd.DataFrame(
        {
            "place": np.tile(at, k),
            "statistic": np.repeat(names, len(at)),
            "detector": level.ravel(),
            "p": sequential.ravel(),
        }
    )
    passed = level >= 1
    first = [int(row.argmax()) if row.any() else None for row in passed]
    drift = pd.DataFrame(
        {"statistic": names, "first_alarm": pd.array(first, dtype="Int64"), "highest": level.max(1, initial=0.0)}
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
