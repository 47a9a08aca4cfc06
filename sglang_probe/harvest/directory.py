"""Making, resuming and closing a run directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sglang_probe.ask import recorded
from sglang_probe.errors import RunDirectoryError
from sglang_probe.kept_set import KeptFile
from sglang_probe.run import journal, schema
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.manifest import MANIFEST, write_manifest
from sglang_probe.run.run import Run, load_run
from sglang_probe.workload.request import Request, asked_rid

CONFIGURATION = (
    "workload_digest",
    "model",
    "dtype",
    "hook_points",
    "rows_kept",
    "telemetry",
    "server_given",
    "switches",
    "partners",
    "forced_from",
    "forced_digest",
    "kept_digest",
    "submission_order",
    "policy",
    "versions",
)
"""Manifest keys that must agree for two recordings to be of the same thing."""

_SINCE_SCHEMA_4 = frozenset({"forced_digest", "kept_digest"})
"""Keys that older manifests do not have: of those runs this much is unknown, and taken on trust."""


@dataclass(frozen=True)
class Start:
    """What an engine process follows: nothing, in a new run."""

    number: int = 0
    earlier: tuple[dict[str, Any], ...] = ()
    """Durations of earlier engine processes; `seconds` is None for one that was killed."""


def refuse_existing(path: Path) -> None:
    """Refuse a directory that holds anything.

    Raises:
        RunDirectoryError: says how to go on.
    """
    if path.exists() and any(path.iterdir()):
        if not (path / MANIFEST).exists():
            raise RunDirectoryError(f"{path} exists and is not a run directory", fix="choose another output")
        raise RunDirectoryError(
            f"{path} exists already", fix="--overwrite replaces it, --resume finishes an interrupted run"
        )


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
    """Prepare `path` and write a manifest that says `incomplete`.

    Raises:
        RunDirectoryError: it exists and neither `overwrite` nor `resume` was asked; or it belongs to another
            configuration and cannot be resumed.
    """
    start = Start()
    if path.exists() and any(path.iterdir()):
        if not (resume or overwrite) or not (path / MANIFEST).exists():
            refuse_existing(path)
        if resume:
            start = _resume_point(path, manifest)
        else:
            discard_set_aside(path)
            path.rename(_set_aside(path))
    path.mkdir(parents=True, exist_ok=True)
    write_manifest(path, {**manifest, "status": "incomplete"})
    return start


def discard_set_aside(path: Path) -> None:
    """Delete the run that `overwrite` replaced, once the new one is under way."""
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def restore_set_aside(path: Path) -> None:
    """The new run did not come about: put back what it would have replaced, or leave nothing."""
    shutil.rmtree(path)
    if _set_aside(path).exists():
        _set_aside(path).rename(path)


def served(path: Path) -> set[str]:
    """Request ids whose whole record is on disk."""
    return set(Run(path).engine_requests()["rid"])


def write_requests(run: Run, requests: Sequence[Request], kept: KeptFile | None = None) -> dict[str, int]:
    """Join the workload with what the engine recorded, as `requests.parquet`.

    Args:
        kept: the sets that requests of the workload name.

    Returns the number of requests by finish reason.
    """
    ended = {r["rid"]: r for r in run.engine_requests().to_dict("records")}
    seen = set(run.spans()["rid"])
    by_rid = {r.rid: r for r in requests}
    records = []
    for rid in sorted(seen | set(ended)):
        request = by_rid.get(asked_rid(rid))
        if request is None:  # not of the workload: the engine's own warm-up
            continue
        end = ended.get(rid)
        asked = workload_columns(request)
        reason = end["finish_reason"] if end else schema.INTERRUPTED
        if reason == schema.REFUSED:  # what was served is not what was asked
            asked["prompt_ids"] = [schema.REFUSED_TOKEN]
            asked["segments"] = [{"name": schema.REFUSED, "start": 0, "end": 1}]
        records.append(
            {
                "rid": rid,
                "prompt_len": len(asked["prompt_ids"]),
                "output_len": end["output_len"] if end else 0,
                "cached_tokens": end["cached_tokens"] if end else None,
                "retractions": end["retractions"] if end else None,
                "finish_reason": reason,
                "output_ids": end["output_ids"] if end else None,
                **asked,
                **_evicted(request, kept),
            }
        )
    records.sort(key=lambda r: (r["index"], r["rid"]))
    table = pa.Table.from_pylist(records, schema=schema.REQUESTS)
    journal.write_durably(run.path / REQUESTS_FILE, lambda p: pq.write_table(table, p, compression="zstd"))
    counts: dict[str, int] = {}
    for r in records:
        counts[r["finish_reason"]] = counts.get(r["finish_reason"], 0) + 1
    return counts


def workload_columns(request: Request) -> dict[str, Any]:
    """What `requests.parquet` has of a request before it is served (`run.workload_digest.COLUMNS`)."""
    return {
        "index": request.index,
        "family": request.family,
        "prompt_ids": list(request.prompt_ids),
        "segments": [{"name": s.name, "start": s.start, "end": s.end} for s in request.spans],
        "sampling_params": json.dumps(recorded(request.sampling_params)),
        "labels": [asdict(label) for label in request.labels] or None,
        **{name: getattr(request.truth, name, None) for name in schema.TRUTH.names},
    }


def _evicted(request: Request, kept: KeptFile | None) -> dict[str, Any]:
    key = request.ask.evict
    if key is None or kept is None:
        return {}
    return {"evict": key, "cache_len": kept.shapes[key][-1], "kept": kept.counts[key][0].reshape(-1).tolist()}


def _set_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def difference(old: dict[str, Any], new: dict[str, Any], *, keys: Sequence[str] = CONFIGURATION) -> str | None:
    """The first configuration key in which two manifests differ, if any."""
    unknown = _SINCE_SCHEMA_4 - old.keys() if old["schema_version"] < 4 else frozenset()
    compared = (k for k in keys if k not in unknown)
    return next((k for k in compared if old.get(k) != json.loads(json.dumps(new.get(k), default=str))), None)


def _resume_point(path: Path, manifest: dict[str, Any]) -> Start:
    old = Run(path)
    if key := difference(old.manifest, manifest):
        raise RunDirectoryError(
            f"{path} was started with another `{key}` and cannot be resumed",
            fix="use the original configuration, or --overwrite",
        )
    journal.discard_leftovers(path)
    parts = journal.read(path)
    (path / "fault.txt").unlink(missing_ok=True)
    if not parts:
        return Start()
    following = max(part.session for part in parts) + 1
    earlier = schema.starts_of(old.manifest)
    earlier += [{"seconds": None, "requests": None}] * (following - len(earlier))
    return Start(following, tuple(earlier))
