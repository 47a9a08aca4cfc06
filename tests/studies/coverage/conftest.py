"""Random run directories: prefixes that branch, reuse from anywhere, retractions, dropped facts, discarded steps."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sglang_probe.run import journal, schema
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Run]:
    """Write requests and spans (missing columns are filled in) as a run directory."""

    def write(requests: list[dict[str, Any]], spans: list[dict[str, Any]], name: str = "run", **manifest: Any) -> Run:
        path = tmp_path / name
        path.mkdir()
        rows = [
            {"prompt_len": len(r["prompt_ids"]), "output_len": len(r["output_ids"]), "finish_reason": "length"}
            | {"index": i, "segments": [], "sampling_params": "{}"}
            | r
            for i, r in enumerate(requests)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema.LIVE_REQUESTS), path / REQUESTS_FILE)
        empty = {"attempt": 0, "status": "computed", "phase": None, "forward_id": 0, "chunk": -1, "row_start": -1}
        for number, part in enumerate([spans[::2], spans[1::2]]):
            table = pa.Table.from_pylist([{**empty, "row_step": 0, **s} for s in part], schema=schema.SPANS)
            file = f"ledger/spans-{number:05d}.parquet"
            digest = journal.write_durably(path / file, lambda p, table=table: pq.write_table(table, p))
            journal.append(path, journal.Part(number, 0, 0, 0, 0, {file: digest}))
        fields = {"schema_version": schema.SCHEMA_VERSION, "status": "complete", "name": name, "hook_points": {}}
        (path / MANIFEST).write_text(json.dumps({**fields, **manifest}))
        return load_run(path)

    return write


def random_traffic(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Requests in workload order, and the spans that a cached server could have made of them in another order."""
    rng = random.Random(seed)
    requests: list[dict[str, Any]] = []
    for i in range(rng.randint(2, 14)):
        prompt: list[int] = []
        if requests and rng.random() < 0.8:
            other = rng.choice(requests)
            whole = other["prompt_ids"] + other["output_ids"]
            prompt = whole[: rng.randint(0, len(whole))]
        prompt = prompt + [rng.randrange(3) for _ in range(rng.choice([0, 1, 5, 40]))] or [0]
        output = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
        cut = sorted(rng.sample(range(len(prompt) + 1), k=min(2, len(prompt) + 1)))
        segments = [
            {"name": rng.choice(["a", "b"]), "start": s, "end": e}
            for s, e in zip([0, *cut], [*cut, len(prompt)], strict=True)
            if e > s and rng.random() < 0.9
        ]
        family = rng.choice(["f", "g", None])
        requests.append(
            {"rid": f"r{i}", "prompt_ids": prompt, "output_ids": output, "segments": segments, "family": family}
        )
    spans: list[dict[str, Any]] = []
    computed: dict[tuple[str, int], set[int]] = {}
    order = rng.sample(requests, k=len(requests))
    for place, r in enumerate(order):
        for attempt in range(2 if rng.random() < 0.2 else 1):
            spans += _attempt(rng, r, attempt, order[: place + 1], computed)
    rng.shuffle(spans)
    return requests, spans


def _attempt(
    rng: random.Random,
    r: dict[str, Any],
    attempt: int,
    before: list[dict[str, Any]],
    computed: dict[tuple[str, int], set[int]],
) -> list[dict[str, Any]]:
    ids = r["prompt_ids"] + r["output_ids"]
    length, at, spans = len(ids) - 1, 0, []

    def span(end: int, **fields: Any) -> None:
        nonlocal at
        spans.append({"rid": r["rid"], "attempt": attempt, "start": at, "end": end, **fields})
        at = end

    while at < len(r["prompt_ids"]) - 1 and rng.random() < 0.7:  # reuse, from one request after the other
        other = rng.choice(before)
        tokens = other["prompt_ids"] + other["output_ids"]
        shared = next(
            (p for p, (a, b) in enumerate(zip(ids, tokens, strict=False)) if a != b), min(len(ids), len(tokens))
        )
        sources = [k for k in computed if k[0] == other["rid"]]
        if not sources or rng.random() < 0.2:
            span(rng.randint(at + 1, len(r["prompt_ids"]) - 1), status="reused")
            continue
        source = rng.choice(sources)
        end = at
        elsewhere = rng.random() < 0.2  # parts of the origin are in another segment
        while end < min(shared, len(r["prompt_ids"]) - 1) and (elsewhere or end in computed[source]):
            end += 1
        if end > at:
            span(end, status="reused", origin_rid=source[0], origin_attempt=source[1])
    mine = computed.setdefault((r["rid"], attempt), set())
    while at < length:
        dropped, end = rng.random() < 0.1, rng.randint(at + 1, length)
        phase = "prefill" if at < len(r["prompt_ids"]) else "decode"
        if not dropped:
            mine.update(range(at, end))
        span(end, status="dropped" if dropped else "computed", phase=None if dropped else phase)
    if rng.random() < 0.5:
        mine.add(length)
        span(length + 1, phase="overshoot")
    return spans
