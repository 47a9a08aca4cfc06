"""A run directory of requests that share a prefix cache: the real recorder and writer, and a made-up radix tree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sglang_probe.engine.ledger.facts import Context, ForwardPlan, Matched, RequestEnd
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.run import schema
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run

OUTPUT = [999]


class SmallCache:
    """Serves requests one forward at a time; what the tree holds is a set of prefixes in whole pages."""

    def __init__(self, path: Path, page: int = 1) -> None:
        path.mkdir()
        self.path, self._page = path, page
        self._writer = Writer(path)
        self.recorder = Recorder(self._writer, lineage=Lineage(page, 10_000), captures_rows=False)
        self._held: set[tuple[Any, ...]] = set()
        self._records: list[dict[str, Any]] = []
        self._tag = 0
        self._matched: dict[str, tuple[Context, int]] = {}
        self._segments: dict[str, list[dict[str, Any]]] = {}

    def ask(
        self,
        rid: str,
        ids: Sequence[int],
        *,
        space: str | None = None,
        limit: int | None = None,
        labels: dict[str, str] | None = None,
    ) -> int:
        """The tree is asked for a request's prefix; how much it gives."""
        most = len(ids) - 1 if limit is None else limit
        why = schema.LAST_TOKEN if limit is None else schema.LOGPROBS
        matched = Matched(*self.recorder.asked(), most, why)
        given = 0
        while given + self._page <= most and (space, *ids[: given + self._page]) in self._held:
            given += self._page
        context = Context(np.array(ids, dtype=np.int64), (space, None), matched, json.dumps(labels) if labels else None)
        self._matched[rid] = (context, given)
        return given

    def compute(self, rid: str) -> None:
        """The prompt's forward runs."""
        context, given = self._matched[rid]
        n = len(context.tokens)
        self._tag += 1
        plan = ForwardPlan(self._tag, "extend", [rid], [given], [n], [False], [0], [n], [context], n - given)
        self.recorder.launch(plan)
        self.recorder.commit(self._tag, graph=False)

    def publish(self, rid: str) -> None:
        """The tree takes the prompt's entries."""
        context, given = self._matched[rid]
        ids, (space, _) = context.tokens.tolist(), context.namespace
        whole = len(ids) // self._page * self._page
        pages = range(self._page, whole + 1, self._page)
        new = next((n - self._page for n in pages if (space, *ids[:n]) not in self._held), whole)
        self._held |= {(space, *ids[:n]) for n in pages}
        self.recorder.publish(rid, 0, context, whole, new, min(given, new))

    def end(self, rid: str, segments: Sequence[tuple[str, int]] = ()) -> None:
        """The request ends with one token."""
        context, given = self._matched[rid]
        ids = context.tokens.tolist()
        self.recorder.abort(RequestEnd(rid, len(ids), 1, given, 0, "length", OUTPUT))
        ends = [end for _, end in segments] or [len(ids)]
        names = [name for name, _ in segments] or ["prompt"]
        starts = [0, *ends[:-1]]
        self._records.append(
            {
                **dict.fromkeys(schema.REQUESTS.names),
                "rid": rid,
                "prompt_len": len(ids),
                "output_len": 1,
                "cached_tokens": given,
                "retractions": 0,
                "finish_reason": "length",
                "output_ids": OUTPUT,
                "index": len(self._records),
                "family": rid.rstrip("0123456789"),
                "prompt_ids": ids,
                "segments": [{"name": n, "start": a, "end": b} for n, a, b in zip(names, starts, ends, strict=True)],
                "sampling_params": "{}",
            }
        )

    def serve(self, rid: str, ids: Sequence[int], *, segments: Sequence[tuple[str, int]] = (), **how: Any) -> int:
        """One request after the other; returns what it reused."""
        given = self.ask(rid, ids, **how)
        self.compute(rid)
        self.publish(rid)
        self.end(rid, segments)
        return given

    def evict(self, ids: Sequence[int], down_to: int, space: str | None = None) -> None:
        """The tree loses all prefixes of `ids` that are longer than `down_to`."""
        gone = {(space, *ids[:n]) for n in range(down_to + 1, len(ids) + 1)} & self._held
        gone |= {h for h in self._held if any(h[: len(g)] == g for g in gone)}
        self._held -= gone
        self.recorder.evicted(len(gone) * self._page)

    def flush(self) -> None:
        """The tree loses everything."""
        self._held.clear()
        self.recorder.flushed()

    def close(self, model: str = "") -> Run:
        """The run directory."""
        self.recorder.drain()
        self._writer.flush(timeout=30)
        self._writer.stop()
        pq.write_table(pa.Table.from_pylist(self._records, schema=schema.REQUESTS), self.path / REQUESTS_FILE)
        manifest = {
            "schema_version": schema.SCHEMA_VERSION,
            "status": "complete",
            "hook_points": {},
            "requests_expected": len(self._records),
            "server_resolved": {"page_size": self._page, "max_total_tokens": 100_000},
            "model_path": model,
        }
        (self.path / MANIFEST).write_text(json.dumps(manifest))
        return load_run(self.path)
