"""Segments on disk: each is a run directory of its own, `DIR/segment-00000`, that the ordinary reader and checks take.

A segment is `recording` until it is closed, then `complete`; `incomplete` if the probe stopped itself; and
`interrupted` if the server ended without closing it, which the next server on the same directory finds out.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sglang_probe.run import journal, schema, seal
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.lock import Held, hold
from sglang_probe.run.manifest import MANIFEST, new_manifest, write_manifest
from sglang_probe.run.run import Run, load_run

logger = logging.getLogger("sglang_probe")

RECORDING = "recording"
_LOCK = ".lock"


def lock(root: Path) -> Held:
    """Take a live directory for this process.

    Raises:
        RunDirectoryError: another server records there.
    """
    return hold(root / _LOCK, f"another server records into {root}", fix="give each server its own `run`")


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
        first_of_process: whether no earlier segment can hold what this one refers to: the first of a server process,
            and the first after a stop.
        facts: manifest fields that are the same for all segments of a server process.
    """
    path = segment_path(root, number)
    path.mkdir(parents=True)
    segment = {"number": number, "first_of_process": first_of_process, "carried_in": {}}
    try:
        write_manifest(path, new_manifest(**facts, name=path.name, status=RECORDING, segment=segment))
    except BaseException:
        remove(path)
        raise
    return path


def remove(path: Path) -> None:
    """Take back a segment in which nothing was recorded."""
    shutil.rmtree(path, ignore_errors=True)


def note(path: Path, **fields: Any) -> None:
    """Set fields of the manifest of a segment that is being recorded."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    write_manifest(path, {**manifest, **fields})


def note_carried(path: Path, carried: Mapping[str, list[int]]) -> None:
    """Write down which requests a segment continues: `rid: [attempt, position]`."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    manifest["segment"]["carried_in"] = dict(carried)
    write_manifest(path, manifest)


def close_segment(
    path: Path,
    status: str,
    *,
    prompt_lens: Mapping[str, int] | None = None,
    fault: str | None = None,
    told: Mapping[str, Any] | None = None,
) -> None:
    """Write `requests.parquet` and the final manifest of a segment whose parts are durable.

    Args:
        prompt_lens: of the requests that are still in flight; None if that is not known (the server died).
        told: further fields of the manifest, and `carried_in` of the segment.
    """
    run = load_run(path)
    manifest = run.manifest
    seen, by_status, by_phase = _count_spans(run)
    finish: Counter[str] = Counter()
    journal.write_durably(path / REQUESTS_FILE, lambda p: _write_requests(run, p, seen, prompt_lens, finish))
    told = dict(told or {})
    manifest["segment"]["carried_in"] = told.pop("carried_in", manifest["segment"]["carried_in"])
    manifest["segment"]["closed"] = datetime.now(UTC).isoformat(timespec="seconds")
    manifest.update(
        told,
        status=status,
        fault=fault,
        requests_expected=finish.total(),
        requests_by_finish=dict(finish),
        positions_by_status=dict(by_status),
        positions_by_phase=dict(by_phase),
        rows=run.row_count(),
        facts=run.facts(),
        files=run.recorded_files(),
    )
    seal.close(path, manifest)


def recover(root: Path) -> list[Path]:
    """Close segments that a server left behind. Call it with the directory locked, before a new segment is opened."""
    recovered = []
    for path in existing(root):
        try:
            if load_run(path).manifest["status"] == RECORDING:
                journal.discard_leftovers(path)
                for left in path.glob(".lock*"):
                    left.unlink()
                close_segment(path, "interrupted", fault="the server ended without closing this segment")
                recovered.append(path)
        except Exception:  # a damaged old segment must not keep a server from starting
            logger.exception("sglang-probe could not recover %s", path)
    return recovered


def _count_spans(run: Run) -> tuple[set[str], Counter[str], Counter[str]]:
    """Requests that have spans, and positions by status and phase: one part at a time, outside Python where possible,
    because this happens in a process that is serving."""
    seen: set[str] = set()
    by_status: Counter[str] = Counter()
    by_phase: Counter[str] = Counter()
    for table in _parts(run, "spans", schema.SPANS):
        seen.update(pc.unique(table["rid"]).to_pylist())
        lengths = table.append_column("positions", pc.subtract(table["end"], table["start"]))
        for row in lengths.group_by(["status", "phase"]).aggregate([("positions", "sum")]).to_pylist():
            by_status[row["status"]] += row["positions_sum"]
            if row["phase"] is not None:
                by_phase[row["phase"]] += row["positions_sum"]
    return seen, by_status, by_phase


def _write_requests(
    run: Run, path: Path, seen: set[str], prompt_lens: Mapping[str, int] | None, finish: Counter[str]
) -> None:
    """Write `requests.parquet` part by part; `finish` receives the number of requests by finish reason."""
    with pq.ParquetWriter(path, schema.LIVE_REQUESTS, compression="zstd") as out:
        for part, table in _numbered(run, "requests", schema.ENGINE_REQUESTS):
            prompts = {r["rid"]: r for _, t in _numbered(run, "prompts", schema.PROMPTS, part) for r in t.to_pylist()}
            records = []
            for end in table.to_pylist():
                told = prompts.get(end["rid"], {})
                prompt = {name: told.get(name) for name in ("prompt_ids", "prompt_hash")}
                records.append({**_unknown(finish.total(), end["prompt_len"]), **end, **prompt})
                finish[end["finish_reason"]] += 1
                seen.discard(end["rid"])
            out.write_table(pa.Table.from_pylist(records, schema=schema.LIVE_REQUESTS))
        records = []
        for rid in sorted(seen):
            if prompt_lens is None:
                reason = schema.INTERRUPTED
            else:
                reason = schema.CONTINUES if rid in prompt_lens else schema.ENDED_EARLIER
            length = (prompt_lens or {}).get(rid)
            records.append({**_unknown(finish.total(), length), "rid": rid, "finish_reason": reason})
            finish[reason] += 1
        out.write_table(pa.Table.from_pylist(records, schema=schema.LIVE_REQUESTS))


def _unknown(index: int, prompt_len: int | None) -> dict[str, Any]:
    """A row of `requests.parquet` of which only the prompt's length may be known."""
    row: dict[str, Any] = dict.fromkeys(schema.LIVE_REQUESTS.names)
    segments = [] if prompt_len is None else [{"name": "prompt", "start": 0, "end": prompt_len}]
    return {**row, "index": index, "prompt_len": prompt_len, "output_len": 0, "segments": segments}


def _parts(run: Run, name: str, table_schema: pa.Schema) -> Iterator[pa.Table]:
    return (table for _, table in _numbered(run, name, table_schema))


def _numbered(run: Run, name: str, table_schema: pa.Schema, only: int | None = None) -> Iterator[tuple[int, pa.Table]]:
    for part in run.parts():
        for file in part.files:
            if file.startswith(f"ledger/{name}-") and only in (None, part.number):
                yield part.number, pq.read_table(run.path / file, schema=table_schema)
