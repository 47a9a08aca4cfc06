"""Segments on disk: each is a run directory of its own, `DIR/segment-00000`, that the ordinary reader and checks take.

A segment is `recording` until it is closed, then `complete`; `incomplete` if the probe stopped itself; and
`interrupted` if the server ended without closing it, which the next server on the same directory finds out.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sglang_probe.capture import journal
from sglang_probe.errors import RunDirectoryError
from sglang_probe.harvest.directory import new_manifest, write_manifest
from sglang_probe.ledger import schema
from sglang_probe.ledger.run import MANIFEST, REQUESTS_FILE, Run, load_run

logger = logging.getLogger("sglang_probe")

RECORDING = "recording"
_LOCK = ".lock"


def lock(root: Path) -> IO[str]:
    """Take a live directory for this process; keep the handle open as long as it records.

    Raises:
        RunDirectoryError: another server records there.
    """
    root.mkdir(parents=True, exist_ok=True)
    handle = open(root / _LOCK, "w", encoding="utf-8")  # noqa: SIM115 - held for the life of the process
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise RunDirectoryError(f"another server records into {root}", fix="give each server its own `run`") from None
    return handle


def segment_path(root: Path, number: int) -> Path:
    return root / f"segment-{number:05d}"


def existing(root: Path) -> list[Path]:
    """Segments of a live directory, in order."""
    return sorted(p for p in root.glob("segment-*") if (p / MANIFEST).exists())


def next_number(root: Path) -> int:
    """The number of the next segment; directories without a manifest count too, they were begun."""
    numbers = [int(p.name.rsplit("-", 1)[1]) for p in root.glob("segment-*") if p.name.rsplit("-", 1)[1].isdigit()]
    return max(numbers, default=-1) + 1


def open_segment(root: Path, number: int, first_of_process: bool, facts: Mapping[str, Any]) -> Path:
    """Make the directory and its manifest.

    Args:
        first_of_process: whether no earlier segment can hold what this one refers to.
        facts: manifest fields that are the same for all segments of a server process.
    """
    path = segment_path(root, number)
    path.mkdir(parents=True)
    segment = {"number": number, "first_of_process": first_of_process, "carried_in": {}}
    write_manifest(path, new_manifest(**facts, name=path.name, status=RECORDING, segment=segment))
    return path


def note_carried(path: Path, carried: Mapping[str, list[int]]) -> None:
    """Write down which requests a segment continues: `rid: [attempt, position]`."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    manifest["segment"]["carried_in"] = dict(carried)
    write_manifest(path, manifest)


def close_segment(
    path: Path, status: str, *, prompt_lens: Mapping[str, int] | None = None, fault: str | None = None
) -> None:
    """Write `requests.parquet` and the final manifest of a segment whose parts are durable.

    Args:
        prompt_lens: of the requests that are still in flight; None if that is not known (the server died).
    """
    run = load_run(path)
    spans = run.spans()
    records = _requests(run, set(spans["rid"]), prompt_lens)
    table = pa.Table.from_pylist(records, schema=schema.LIVE_REQUESTS)
    journal.write_durably(path / REQUESTS_FILE, lambda p: pq.write_table(table, p, compression="zstd"))
    lengths = spans["end"] - spans["start"]
    manifest = run.manifest
    manifest["segment"]["closed"] = datetime.now(UTC).isoformat(timespec="seconds")
    finish: dict[str, int] = {}
    for r in records:
        finish[r["finish_reason"]] = finish.get(r["finish_reason"], 0) + 1
    manifest.update(
        status=status,
        fault=fault,
        requests_expected=len(records),
        requests_by_finish=finish,
        positions_by_status={k: int(v) for k, v in lengths.groupby(spans["status"]).sum().items()},
        positions_by_phase={k: int(v) for k, v in lengths.groupby(spans["phase"]).sum().items()},
        rows=max((p.rows_end for p in run.parts()), default=0),
        files={name: digest for p in run.parts() for name, digest in p.files.items()},
    )
    write_manifest(path, manifest)


def recover(root: Path) -> list[Path]:
    """Close segments that a server left behind. Call it with the directory locked, before a new segment is opened."""
    recovered = []
    for path in existing(root):
        try:
            if load_run(path).manifest["status"] == RECORDING:
                journal.discard_leftovers(path)
                close_segment(path, "interrupted", fault="the server ended without closing this segment")
                recovered.append(path)
        except Exception:  # a damaged old segment must not keep a server from starting
            logger.exception("sglang-probe could not recover %s", path)
    return recovered


def _requests(run: Run, seen: set[str], prompt_lens: Mapping[str, int] | None) -> list[dict[str, Any]]:
    ended = {r["rid"]: r for r in run.engine_requests().to_dict("records")}
    prompts = {r["rid"]: r for r in _prompts(run)}
    records: list[dict[str, Any]] = []
    for rid in [*ended, *sorted(seen - set(ended))]:
        end, prompt = ended.get(rid), prompts.get(rid)
        length = int(end["prompt_len"]) if end else (prompt_lens or {}).get(rid)
        if end:
            finish = end["finish_reason"]
        elif prompt_lens is None:
            finish = schema.INTERRUPTED
        else:
            finish = schema.CONTINUES if rid in prompt_lens else schema.ENDED_EARLIER
        records.append(
            {
                "rid": rid,
                "prompt_len": length,
                "output_len": end["output_len"] if end else 0,
                "cached_tokens": end["cached_tokens"] if end else None,
                "retractions": end["retractions"] if end else None,
                "finish_reason": finish,
                "output_ids": end["output_ids"] if end else None,
                "index": len(records),
                "family": None,
                "prompt_ids": prompt["prompt_ids"] if prompt else None,
                "segments": [{"name": "prompt", "start": 0, "end": length}] if length is not None else [],
                "sampling_params": None,
                "prompt_hash": prompt["prompt_hash"] if prompt else None,
            }
        )
    return records


def _prompts(run: Run) -> list[dict[str, Any]]:
    files = [run.path / f for part in run.parts() for f in part.files if f.startswith("ledger/prompts-")]
    return [record for f in files for record in pq.read_table(f, schema=schema.PROMPTS).to_pylist()]
