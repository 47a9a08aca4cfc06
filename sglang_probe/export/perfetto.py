"""A run, or a minute of it, as a trace that https://ui.perfetto.dev opens: what each forward pass computed for whom.

The format is the Trace Event Format of Chromium (`X` slices, `i` instants, `C` counters, `M` names; microseconds).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.run import journal, schema
from sglang_probe.run.causes import autopsy, causes_known
from sglang_probe.run.run import Run

ENGINE, REQUESTS = 1, 2


def export_perfetto(run: Run, file: Path, *, first: float = 0.0, seconds: float | None = 60.0) -> int:
    """Write the trace of the forward passes launched within `[first, first + seconds)` of the run's first launch.

    Args:
        seconds: None: until the end.

    Returns how many events it has.

    Raises:
        ConfigError: no forward pass was launched then.
    """
    forwards = run.forwards().sort_values("launched", kind="stable", ignore_index=True)
    began = float(forwards["launched"].min()) if len(forwards) else 0.0
    since = forwards["launched"] - began
    inside = forwards[(since >= first) & (since < (np.inf if seconds is None else first + seconds))]
    if inside.empty:
        last = float(since.max()) if len(since) else 0.0
        raise ConfigError(
            f"no forward pass was launched then; the last one of {run.path} was after {last:.1f} s",
            fix="see --first and --seconds",
        )
    events = [*_names(inside, run), *_forwards(inside, began), *_requests(run, inside, began)]
    file.parent.mkdir(parents=True, exist_ok=True)
    journal.write_text_durably(file, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    return len(events)


def _names(forwards: pd.DataFrame, run: Run) -> Iterator[dict[str, Any]]:
    for pid, name in ((ENGINE, f"engine: {run.path.name}"), (REQUESTS, "requests")):
        yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
    for rank in sorted(forwards["dp_rank"].unique()):
        for lane in (0, 1):  # with overlap scheduling a forward is launched before the one before it is processed
            tid = 2 * int(rank) + lane
            yield {"ph": "M", "pid": ENGINE, "tid": tid, "name": "thread_name", "args": {"name": f"rank {rank}"}}


def _forwards(forwards: pd.DataFrame, began: float) -> Iterator[dict[str, Any]]:
    for i, f in enumerate(forwards.itertuples()):
        at = round(1e6 * (f.launched - began))
        counts = {n: int(getattr(f, n)) for n in ("requests", "prefill_tokens", "decode_tokens")}
        yield {
            "ph": "X",
            "pid": ENGINE,
            "tid": 2 * int(f.dp_rank) + i % 2,
            "ts": at,
            "dur": max(round(1e6 * f.seconds), 1),
            "name": str(f.mode),
            "args": {"forward": int(f.forward_id), **counts, "graph": bool(f.graph)},
        }
        for name, value in (("waiting", int(f.waiting)), ("prefill tokens", counts["prefill_tokens"])):
            yield {"ph": "C", "pid": ENGINE, "ts": at, "name": f"{name}, rank {f.dp_rank}", "args": {name: value}}


def _requests(run: Run, forwards: pd.DataFrame, began: float) -> Iterator[dict[str, Any]]:
    launched = dict(zip(forwards["forward_id"], forwards["launched"] - began, strict=True))
    ended = {f: launched[f] + s for f, s in zip(forwards["forward_id"], forwards["seconds"], strict=True)}
    spans = run.spans()
    spans = spans[spans["status"].isin([schema.COMPUTED, schema.REUSED])]
    why = _why(run)
    tracks: dict[str, int] = {}
    for s in spans.itertuples():
        n = int(s.end) - int(s.start)
        steps = range(n) if s.phase in schema.STEP_PHASES else range(1)
        there = [int(s.forward_id) + i for i in steps if int(s.forward_id) + i in launched]
        if not there:
            continue
        if s.rid not in tracks:
            tracks[s.rid] = len(tracks)
            name = {"name": str(s.rid)}
            yield {"ph": "M", "pid": REQUESTS, "tid": tracks[s.rid], "name": "thread_name", "args": name}
        at = round(1e6 * launched[there[0]])
        where = {"positions": f"{s.start} to {s.end}", "attempt": int(s.attempt), "forward": there[0]}
        event = {"pid": REQUESTS, "tid": tracks[s.rid], "ts": at}
        if s.status == schema.REUSED:
            origin = s.origin_rid if isinstance(s.origin_rid, str) else "before the recording"
            yield {**event, "ph": "i", "s": "t", "name": f"reused {n}", "args": {**where, "of": origin}}
            continue
        causes = why.get((s.rid, s.attempt, int(s.forward_id)), {}) if s.phase not in schema.STEP_PHASES else {}
        end = round(1e6 * max(ended[f] for f in there))
        yield {**event, "ph": "X", "dur": max(end - at, 1), "name": f"{s.phase} {n}", "args": {**where, **causes}}


def _why(run: Run) -> dict[tuple[str, int, int], dict[str, int]]:
    """Causes of what each forward computed of each request, where the run says them."""
    if not causes_known(run):
        return {}
    out: dict[tuple[str, int, int], dict[str, int]] = {}
    for p in autopsy(run).pieces.itertuples():
        causes = out.setdefault((p.rid, p.attempt, int(p.forward_id)), {})
        causes[p.cause] = causes.get(p.cause, 0) + int(p.end - p.start)
    return out
