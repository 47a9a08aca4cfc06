"""Closing a segment: what its writer still has goes to disk, then the segment becomes a run of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.engine.ledger.facts import Commit
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.engine.live import segments
from sglang_probe.run import journal

logger = logging.getLogger("sglang_probe")


@dataclass
class Stopped:
    """A segment whose recording has stopped and that is to be closed."""

    path: Path
    writer: Writer | None
    fault: str
    told: dict[str, Any]


def finish(
    path: Path,
    writer: Writer,
    status: str,
    late: Commit | None,
    *,
    lengths: dict[str, int] | None,
    fault: str | None,
    told: Mapping[str, Any],
    read: Callable[[Path], Mapping[str, Any]],
) -> None:
    """Close a segment to which nothing more comes.

    Args:
        late: the last facts. lengths, told: see `segments.close_segment`.
        read: asked for further fields of the manifest, once everything was written.

    Raises:
        OSError: not everything could be written; what could be is closed as `incomplete`.
    """
    error: Exception | None = None
    try:
        if writer.error is None and late is not None:
            writer.put(late)
        writer.flush(timeout=120)
    except Exception as e:
        error = e
        status, lengths, fault = "incomplete", None, f"not everything could be written: {e}"
        journal.discard_leftovers(path)
    finally:
        writer.stop()
    try:
        told = {**told, **read(path)}
    except Exception as e:  # a segment without these fields is one all the same
        error = error or e
    segments.close_segment(path, status, prompt_lens=lengths, fault=fault, told=told)
    if error is not None:
        raise error


def close_stopped(root: Path, stopped: list[Stopped]) -> tuple[int, int]:
    """Close what can be closed of these segments, and take it off the list. Returns how many were, and were not."""
    closed = failed = 0
    for item in list(stopped):
        if item.writer is not None:
            writer, item.writer = item.writer, None
            with suppress(Exception):  # what can be written is a segment all the same
                writer.flush(timeout=30)
            writer.stop()
        try:
            with suppress(OSError):
                journal.write_text_durably(root / "fault.txt", item.fault + "\n")
            journal.discard_leftovers(item.path)
            segments.close_segment(item.path, "incomplete", fault=item.fault, told=item.told)
        except Exception:
            failed += 1
            logger.exception("sglang-probe could not close %s; it will try again", item.path)
        else:
            stopped.remove(item)
            closed += 1
    return closed, failed
