"""Making, resuming, replacing and closing a run directory.

Beside a run directory `run` there may be `.run.lock`, held by the process that changes any of these; `.run.replaced`,
the run that `--overwrite` is replacing; and `.run.discarded`, which is being deleted and can go at any time. Every step
below is one rename, or one write of the manifest, so that a kill or a power cut leaves one of these states and no
other. R is the run that was there, N the new one.

    step                                 run        .replaced   what the next command does
    (before the first recording)         nothing    -           records
    the folder is made                   empty      -           records: a folder without a manifest that holds nothing
                                                                but our own locks and half-written files is empty
    the first manifest                   started    -           --resume records, --overwrite begins again
    the first part                       partial    -           --resume finishes, --overwrite replaces
    the last manifest                    complete   -           --resume keeps, --overwrite replaces

    --overwrite: R is renamed aside      nothing    R           puts R back, then as above: nothing has happened
    the folder is made                   empty      R           the same
    the first manifest                   started N  R           --resume records N; --overwrite discards N, R stays
    the first part                       partial N  R           --resume finishes N; --overwrite discards N if R is
                                                                complete, else R, and keeps the other aside
    the last manifest                    complete N R           discards R
    R is discarded                       complete N -

    N ends without a part (the engine did not start, all requests were refused): N is discarded, which leaves
    (nothing, R), and R is put back.

So a complete run is deleted only once another complete one is in its place. To discard is to rename to `.run.discarded`
and to delete that: a folder that is half deleted never has the name of a run.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from sglang_probe.engine.hooks.config import fault_file
from sglang_probe.errors import ConfigError, ProbeError, RunDirectoryError
from sglang_probe.run import journal, schema
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.lock import Held, hold
from sglang_probe.run.manifest import MANIFEST, write_manifest
from sglang_probe.run.run import Run, load_run

CONFIGURATION = (
    "workload_digest",
    "model",
    "dtype",
    "hook_points",
    "rows_kept",
    "telemetry",
    "sampling",
    "server_given",
    "switches",
    "partners",
    "forced_from",
    "forced_digest",
    "kept_digest",
    "steer",
    "scores",
    "submission_order",
    "order",
    "policy",
    "versions",
    "platform",
)
"""Manifest keys that must agree for two recordings to be of the same thing."""

_SINCE_SCHEMA_4 = frozenset({"forced_digest", "kept_digest"})
"""Keys that older manifests do not have: of those runs this much is unknown, and taken on trust."""

_NOT_IN_ALL = frozenset({"platform", "steer", "scores", "order"})
"""Keys that manifests of this schema may lack; taken on trust as well."""


class State(Enum):
    """What is at a path."""

    NOTHING = "nothing"
    EMPTY = "empty"
    STARTED = "started"
    PARTIAL = "partial"
    COMPLETE = "complete"
    SEGMENT = "segment"
    """Of a live recording."""
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Start:
    """What an engine process follows: nothing, in a new run."""

    number: int = 0
    earlier: tuple[dict[str, Any], ...] = ()
    """Durations of earlier engine processes; `seconds` is None for one that was killed."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Requests that are not asked again, and why."""
    suspects: Mapping[str, str] = field(default_factory=dict)
    """Requests that were in flight when an engine died, and why it did: served after the others, one at a time."""


def state_of(path: Path) -> State:
    """What is at `path`."""
    if not path.exists():
        return State.NOTHING
    if not path.is_dir():
        return State.FOREIGN
    if not (path / MANIFEST).exists():
        return State.EMPTY if all(_OURS.fullmatch(p.name) for p in path.iterdir()) else State.FOREIGN
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["status"] == "complete":
            return State.SEGMENT if "segment" in manifest else State.COMPLETE
        if "segment" in manifest:
            return State.SEGMENT
        return State.PARTIAL if journal.read(path) else State.STARTED
    except (ValueError, KeyError, TypeError, ProbeError):
        return State.PARTIAL  # damaged: there is something to lose


def hold_directory(path: Path) -> Held:
    """Become the only one who changes the run directory `path`.

    Raises:
        RunDirectoryError: another process records there, or the folder that it is in cannot be written.
    """
    path = path.resolve()
    try:
        return hold(
            _beside(path, "lock"),
            f"another process records into {path}",
            fix="wait until it ends, or end it; or choose another output",
        )
    except OSError as e:
        raise RunDirectoryError(f"{path.parent} cannot be written: {e.strerror}", fix="choose another output") from e


def refuse_existing(path: Path) -> None:
    """Refuse a directory that holds anything.

    Raises:
        RunDirectoryError: says how to go on.
    """
    state = state_of(path)
    aside = _beside(path, "replaced")
    if state is State.FOREIGN:
        raise RunDirectoryError(f"{path} exists and is not a run directory", fix="choose another output")
    if state is State.SEGMENT:
        raise RunDirectoryError(f"{path} is a segment of a live recording", fix="choose another output")
    if state not in (State.NOTHING, State.EMPTY) or aside.exists():
        raise RunDirectoryError(
            f"{path} exists already", fix="--overwrite replaces it, --resume finishes an interrupted run"
        )


def refuse_both(*, overwrite: bool, resume: bool) -> None:
    """Refuse two flags of which one replaces what the other keeps.

    Raises:
        ConfigError: both were given.
    """
    if overwrite and resume:
        raise ConfigError("`overwrite` and `resume` contradict each other", fix="choose one")


def refuse_soon(path: Path, *, overwrite: bool, resume: bool) -> None:
    """Before the seconds that preparing takes: refuse what `hold_directory` and `open_directory` would refuse whatever
    the configuration. Nothing is held afterwards.

    Raises:
        RunDirectoryError: another process records there; or it exists and neither `overwrite` nor `resume` was asked.
        ConfigError: both were.
    """
    refuse_both(overwrite=overwrite, resume=resume)
    if path.parent.is_dir():
        with hold_directory(path):
            _refuse_unless_asked(path, state_of(path), asked=overwrite or resume)


def _refuse_unless_asked(path: Path, state: State, *, asked: bool) -> None:
    if not asked or state in (State.FOREIGN, State.SEGMENT):
        refuse_existing(path)


def complete_run(path: Path, wanted: dict[str, Any]) -> Run | None:
    """The run at `path`, if it is complete and is the wanted one; None if it is not complete.

    Raises:
        RunDirectoryError: it is a complete run of something else; names the key.
    """
    if not (path / MANIFEST).exists() or not (run := load_run(path)).complete:
        return None
    if key := difference(run.manifest, wanted):
        raise RunDirectoryError(
            f"{path} was recorded with another `{key}`",
            fix="use the original configuration, or --overwrite, which records everything again",
        )
    return run


def open_directory(path: Path, manifest: dict[str, Any], *, overwrite: bool, resume: bool) -> Start:
    """Prepare `path` and write a manifest that says `incomplete`. The caller holds the directory.

    Raises:
        RunDirectoryError: it exists and neither `overwrite` nor `resume` was asked; or it belongs to another
            configuration and cannot be resumed.
    """
    settle(path)
    start = Start()
    state = state_of(path)
    _refuse_unless_asked(path, state, asked=overwrite or resume)
    if state not in (State.NOTHING, State.EMPTY):
        if resume:
            start = _resume_point(path, manifest)
        else:
            _set_aside(path, state)
    path.mkdir(parents=True, exist_ok=True)
    journal.sync_folder(path.parent)
    write_manifest(
        path,
        {
            **manifest,
            "status": "incomplete",
            "starts": list(start.earlier),
            "refused": dict(start.refused),
            "ended_engine": {rid: {"alone": False, "reason": why} for rid, why in start.suspects.items()},
        },
    )
    (path / REQUESTS_FILE).unlink(missing_ok=True)  # of an earlier start; written anew at the end
    return start


def settle(path: Path) -> None:
    """Finish what a killed command left half done beside `path`. The caller holds the directory.

    Raises:
        RunDirectoryError: a run was set aside, and something else is in its place.
    """
    shutil.rmtree(_beside(path, "discarded"), ignore_errors=True)
    aside = _beside(path, "replaced")
    if not aside.exists():
        return
    state = state_of(path)
    if state is State.COMPLETE:
        _discard(aside, path)
    elif state in (State.NOTHING, State.EMPTY):
        if state is State.EMPTY:
            _discard(path, path)
        aside.rename(path)
        journal.sync_folder(path.parent)
    elif state is State.FOREIGN:
        raise RunDirectoryError(
            f"{path} is not a run directory, and {aside} holds the run that was there", fix="move one of them away"
        )


def close_directory(path: Path) -> None:
    """The recording has ended: discard the run that it replaced if it is complete, and go back to that one if there is
    not one part. The caller holds the directory."""
    if state_of(path) is State.STARTED and _beside(path, "replaced").exists():
        _discard(path, path)
    settle(path)


def discard_directory(path: Path) -> None:
    """The recording did not come about: leave what was there before. The caller holds the directory."""
    if path.exists():
        _discard(path, path)
    settle(path)


def served(path: Path) -> set[str]:
    """Request ids whose whole record is on disk."""
    return set(Run(path).engine_requests()["rid"])


def _set_aside(path: Path, state: State) -> None:
    aside = _beside(path, "replaced")
    if aside.exists():
        better = state is State.COMPLETE or (state is State.PARTIAL and state_of(aside) is not State.COMPLETE)
        _discard(aside if better else path, path)
    if path.exists():
        path.rename(aside)
        journal.sync_folder(path.parent)


def _discard(folder: Path, path: Path) -> None:
    """Delete `folder`, which is `path` or beside it, in one step."""
    gone = _beside(path, "discarded")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    journal.sync_folder(path.parent)
    shutil.rmtree(gone, ignore_errors=True)


_OURS = re.compile(r"\.lock(-dp\d+)?|\..+\.(lock|tmp)")
"""Files of ours that may be there before the first manifest is."""


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def difference(old: dict[str, Any], new: dict[str, Any], *, keys: Sequence[str] = CONFIGURATION) -> str | None:
    """The first configuration key in which two manifests differ, if any."""
    unknown = _SINCE_SCHEMA_4 - old.keys() if old["schema_version"] < 4 else frozenset()
    unknown |= _NOT_IN_ALL - old.keys()
    compared = (k for k in keys if k not in unknown)
    return next((k for k in compared if old.get(k) != json.loads(json.dumps(new.get(k), default=str))), None)


def _resume_point(path: Path, manifest: dict[str, Any]) -> Start:
    old = Run(path)
    if key := difference(old.manifest, manifest):
        raise RunDirectoryError(
            f"{path} was started with another `{key}` and cannot be resumed",
            fix="use the original configuration, or --overwrite",
        )
    with ExitStack() as locks:
        for rank in journal.ranks(path):  # waits for engines that are still ending
            locks.enter_context(journal.lock(path, rank))
            (path / fault_file(rank)).unlink(missing_ok=True)
        journal.discard_leftovers(path)
    parts = journal.read(path)
    refused = dict(old.manifest.get("refused") or {})
    suspects = {}
    for rid, how in (old.manifest.get("ended_engine") or {}).items():
        if how["alone"]:
            refused[rid] = f"the engine ended twice with it, the second time when it was served alone: {how['reason']}"
        else:
            suspects[rid] = how["reason"]
    earlier = schema.starts_of(old.manifest)
    following = max((part.session for part in parts), default=-1) + 1
    if len(journal.ranks(path)) > 1:
        # One engine may have asked again what another, which ended, had in flight: a name is not given twice.
        numbers = (rid.partition("~")[2] for rid in old.spans()["rid"].unique())
        following = max([following, *(int(n) + 1 for n in numbers if n.isdigit())])
    earlier += [{"seconds": None, "requests": None}] * (following - len(earlier))
    return Start(len(earlier), tuple(earlier), refused, suspects)
