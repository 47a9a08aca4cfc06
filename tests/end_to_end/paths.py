"""Driving a server along one scheduler path, and reading what the ledger has of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pandas as pd

from sglang_probe.engine.releases import release
from sglang_probe.run import schema
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.verify import verify
from tests.end_to_end.live_server import LiveServer

CHUNK = 64
"""Chunked prefill size of the servers here, in tokens."""

EXTRA = int(release().overshoots_at_length)
"""Positions that a finish by length under overlap scheduling leaves in the tree beyond those of its output."""

_fresh = itertools.count(100)


def prompt(length: int) -> list[int]:
    """Token ids `[length]` that share no prefix with any other prompt of this process."""
    return [next(_fresh), *(500 + i % 2000 for i in range(length - 1))]


def ask(server: LiveServer, body: dict[str, Any] | None = None, n: int = 4, **fields: Any) -> Any:
    """`POST /generate`; the answer as it is, errors included."""
    params = {"max_new_tokens": n, "temperature": 0.0, "ignore_eos": True, **fields.pop("params", {})}
    return server.http.post("/generate", json={"sampling_params": params, **(body or {}), **fields}).json()


@contextmanager
def meanwhile(server: LiveServer, forwards: int = 5, **fields: Any) -> Iterator[Future[Any]]:
    """Ask in another thread; the body runs once that many forward passes have been committed since."""
    start = server.status()["forwards"]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(ask, server, **fields)
        while server.status()["forwards"] < start + forwards and not future.done():
            time.sleep(0.002)
        assert not future.done(), future.result()
        yield future


def recorded(server: LiveServer) -> Run:
    """The segment of everything since the last call; every invariant holds in it."""
    for _ in range(400):
        if not server.status()["requests_in_flight"]:
            break
        time.sleep(0.025)
    run = load_run(server.flush())
    assert {c.name: c.violation for c in verify(run) if not c.holds} == {}
    return run


def spans(run: Run, rid: str) -> list[str]:
    """What became of a request, in words: `0-64 prefill`, `0-49 reused from a`; attempts after a retraction begin with
    `again:`. Decode steps are joined, chunks are not."""
    frame = as_without_overshoot_at_length(run)
    out: list[tuple[Any, ...]] = []
    for s in frame[frame["rid"] == rid].sort_values(["attempt", "start"]).itertuples():
        fate = f"reused from {'before' if pd.isna(s.origin_rid) else s.origin_rid}" if s.status == "reused" else s.phase
        fate = s.status if pd.isna(fate) else fate
        last = out[-1] if out else None
        if last and fate in schema.STEP_PHASES and (last[0], last[2], last[3]) == (s.attempt, s.start, fate):
            out[-1] = (*last[:2], s.end, fate)
        else:
            out.append((s.attempt, s.start, s.end, fate))
    return [f"{'again: ' * attempt}{start}-{end} {fate}" for attempt, start, end, fate in out]


def as_without_overshoot_at_length(run: Run) -> pd.DataFrame:
    """Spans, without the one step that some releases compute behind a finish by length (`Release`)."""
    frame = run.spans()
    if not release().overshoots_at_length:
        return frame
    finish = run.requests().set_index("rid")["finish_reason"]
    known = (frame["phase"] == schema.OVERSHOOT) & (frame["rid"].map(finish) == "length")
    return frame[~known]


def rebinds(run: Run) -> set[str]:
    """Positions whose entries were replaced by another request's: `b 0-20 to a`."""
    return {f"{r.rid} {r.start}-{r.end} to {r.origin_rid}" for r in run.rebinds().itertuples()}


def chunks(end: int, phase: str = "prefill", start: int = 0, prefix: str = "") -> list[str]:
    """Spans of a prompt that is computed in full chunks up to `end`."""
    return [f"{prefix}{a}-{min(a + CHUNK, end)} {phase}" for a in range(start, end, CHUNK)]


def finish(run: Run, rid: str) -> str:
    return str(run.requests().set_index("rid").at[rid, "finish_reason"])


def cached_tokens(run: Run, rid: str) -> int:
    """SGLang's own count."""
    return int(run.requests().set_index("rid").at[rid, "cached_tokens"])
