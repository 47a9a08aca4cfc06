"""Recorded runs against the profile of a reference run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.monitor.adwin import adwin_alarms
from sglang_probe.monitor.alarms import Alarms, alarms, drift_log
from sglang_probe.monitor.profile import Profile, kl_by_dimension, profile
from sglang_probe.monitor.trajectories import Trajectories, read
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae.folder import read_sae
from sglang_probe.sae.manifest import model_of, refuse_other_model
from sglang_probe.studies.base import Measured, records

MOST_DIMENSIONS = 20
"""Dimensions of rows whose divergence is printed, largest first."""


@dataclass(frozen=True)
class Options:
    """What is watched, and how often it may alarm falsely."""

    hook_point: str | None = None
    sae: Path | None = None
    features: Sequence[int] = ()
    where: str = "phase == 'decode'"
    rows: int | None = None
    share: float = 0.01
    """Of trajectories."""
    rate: float = 0.001
    """Of the stream, per trajectory."""
    segment: int | None = None
    """Trajectories of a segment of the drift log; None: each run is one."""
    adwin: bool = False


@dataclass(frozen=True)
class MonitorResult(Measured):
    """What was found."""

    names: Sequence[str]
    """The runs that were monitored."""
    profile: Profile
    found: Alarms
    trajectories: pd.DataFrame
    """`Alarms.trajectories` with run, rid, family and rows."""
    segments: pd.DataFrame
    events: pd.DataFrame
    kl: pd.DataFrame
    """`dimension, kl, floor`: of the runs, and of one half of the reference, both against its other half."""
    adwin: pd.DataFrame | None
    """`statistic, place` of ADWIN's alarms."""
    options: Options
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        return {
            "runs": list(self.names),
            "trajectories": len(self.trajectories),
            "reference_trajectories": len(self.profile.reference),
            "statistics": self.profile.statistics,
            "share": self.options.share,
            "rate": self.options.rate,
            "alarms": int(self.trajectories["alarm"].sum()),
            "drift": records(self.found.drift),
            "segments": records(self.segments),
            "events": records(self.events),
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Alarms, the stream, the drift log, the profile, and the triage."""
        tables = {
            "trajectories": self.trajectories,
            "stream": self.found.stream,
            "drift": self.found.drift,
            "segments": self.segments,
            "events": self.events,
            "profile": self.profile.quantiles,
            "reference": self.profile.reference,
            "kl": self.kl,
        }
        return tables if self.adwin is None else {**tables, "adwin": self.adwin}


def monitor(paths: Sequence[Path], reference: Sequence[Path], options: Options) -> MonitorResult:
    """Judge runs, in the order given, against reference runs.

    Raises:
        ConfigError: a run is its own reference, or the weights of runs or SAE differ; or as
            `sglang_probe.monitor.trajectories.read`.
        RunDirectoryError: a run cannot be read, or has neither scores nor rows of the hook point.
    """
    if same := {p.resolve() for p in paths} & {p.resolve() for p in reference}:
        raise ConfigError(f"{same.pop()} is monitored and its own reference", fix="give another run as --reference")
    runs, theirs = [load_run(p) for p in paths], [load_run(p) for p in reference]
    sae, point, notes = None, options.hook_point, []
    if options.sae is not None:
        sae = read_sae(options.sae, hook_point=point)
        point = point or sae.hook_point
        if point is None:
            raise ConfigError(f"{options.sae} does not say where its rows come from", fix="give --hook-point")
        refuse_other_model(sae, runs, str(options.sae))
    weights = [model_of(r).get("weights_sha256") for r in (runs, theirs)]
    if all(weights) and weights[0] != weights[1]:
        raise ConfigError(
            f"{paths[0]} and the reference {reference[0]} are of models with different weights",
            fix="a profile is of one model: record a reference with the weights that are served now",
        )
    if point is None:
        _refuse_other_probes([*runs, *theirs])
    how: dict[str, Any] = {
        "hook_point": point,
        "sae": sae,
        "features": options.features,
        "where": options.where,
        "rows": options.rows,
    }
    known, watched = read(theirs, **how), read(runs, **how)
    if known.names != watched.names:
        raise ConfigError(f"the reference has {', '.join(known.names)}, and the runs {', '.join(watched.names)}")
    usual, fitted, ranked = profile(known)
    scores = usual.scores(watched)
    found = alarms(scores, usual.reference, share=options.share, rate=options.rate)
    names = _names(paths)
    trajectories = watched.frame.assign(run=[names[i] for i in watched.frame["run"]])
    trajectories = pd.concat([trajectories, found.trajectories], axis=1)
    segments, events = drift_log(found, _segments(trajectories, options.segment), options.share)
    notes += _notes(usual, watched, ranked, options)
    return MonitorResult(
        names=names,
        profile=usual,
        found=found,
        trajectories=trajectories,
        segments=segments,
        events=events,
        kl=_triage(watched, fitted, ranked),
        adwin=_adwin(scores) if options.adwin else None,
        options=options,
        notes=notes,
    )


def _names(paths: Sequence[Path]) -> list[str]:
    names = [p.name for p in paths]
    return names if len(set(names)) == len(names) else [str(p) for p in paths]


def _segments(trajectories: pd.DataFrame, size: int | None) -> pd.Series:
    """The name of the segment of each trajectory."""
    if size is None:
        return trajectories["run"]
    within = trajectories.groupby("run", sort=False).cumcount() // size
    return trajectories["run"] + " " + (within + 1).astype(str)


def _triage(watched: Trajectories, fitted: Trajectories, ranked: Trajectories) -> pd.DataFrame:
    frames = []
    for kind, values in (("column", lambda t: t.values_NK), ("row", _rows)):
        now, base, floor = values(watched), values(fitted), values(ranked)
        if now is None or base is None or floor is None:
            continue
        names = watched.names if kind == "column" else [f"dimension {i}" for i in range(now.shape[1])]
        frames.append(
            pd.DataFrame(
                {"dimension": names, "kl": kl_by_dimension(now, base), "floor": kl_by_dimension(floor, base)}
            ).sort_values("kl", ascending=False, kind="stable")
        )
    return pd.concat(frames, ignore_index=True)


def _rows(of: Trajectories) -> np.ndarray[Any, Any] | None:
    return None if of.x_ND is None else of.x_ND.float().numpy().astype(np.float64)


def _adwin(scores: pd.DataFrame) -> pd.DataFrame:
    found = [{"statistic": s, "place": at} for s in scores for at in adwin_alarms(scores[s].fillna(0))]
    return pd.DataFrame(found, columns=["statistic", "place"])


def _notes(usual: Profile, watched: Trajectories, ranked: Trajectories, options: Options) -> list[str]:
    notes = []
    k, n = len(usual.statistics), len(usual.reference)
    if k / (n + 1) > options.share:
        notes.append(
            f"no single trajectory can alarm: with {k} statistics a share of {options.share:g} needs "
            f"{int(np.ceil(k / options.share)) - 1} reference trajectories to rank against, and there are {n} (the "
            "other half of the reference is fitted to)"
        )
    for what, t in (("the reference", ranked), ("the runs", watched)):
        if (families := t.frame["family"].nunique()) < len(t):
            notes.append(
                f"{what}: {len(t)} trajectories of {families} families. Rates are of trajectories that are independent "
                "of each other; those that share a prefix are not quite"
            )
    if options.rows is None:
        notes.append(
            "trajectories may be of any length here: if lengths have changed, that alone can alarm. `--rows N` "
            "compares the first N rows of each"
        )
    return notes


def _refuse_other_probes(runs: Sequence[Run]) -> None:
    """Scores of one name must be of one probe.

    Raises:
        ConfigError: names two runs that have others.
    """
    seen: dict[str, tuple[tuple[str, str], Run]] = {}
    for run in runs:
        for place, columns in (run.manifest.get("scores") or {}).items():
            for name, probe in columns.items():
                first, where = seen.setdefault(name, ((place, probe), run))
                if first != (place, probe):
                    raise ConfigError(
                        f"the scores `{name}` of {where.path} and of {run.path} are of different probes",
                        fix="record a reference with the probes that are in use now",
                    )
