"""Run directories whose rows are given, written by the real recorder and writer, with as many requests as are wanted.

Each request is prefilled in one forward pass and decoded in steps of its own. The last output token never runs through
the model, as in SGLang, so that a text of P prompt and C output tokens has P + C - 1 rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sglang_probe.engine.ledger.facts import Context, ForwardPlan, RequestEnd
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.run import schema
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run
from sglang_probe.run.selection import RowsConfig

POINT = "blocks.1.hook_resid_post"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Text:
    """One request."""

    prompt: Sequence[int]
    output: Sequence[int]
    rows: Array
    """`[P + C - 1, D]`"""
    system: int = 0
    """Tokens at the start that are the system prompt."""


def make_run_of(path: Path, texts: Sequence[Text], *, cached: int = 0, model: dict[str, Any] | None = None) -> Run:
    """Write the run; request `i` is `t<i>` of family `f<i>`. All but the first reuse `cached` positions of it."""
    path.mkdir(parents=True)
    writer = Writer(path)
    recorder = Recorder(writer, lineage=Lineage(1, 1000), captures_rows=True)
    for i, text in enumerate(texts):
        p, ids = len(text.prompt), [*text.prompt, *text.output]
        start = cached if i else 0
        for tag, (mode, at, end) in enumerate(
            [("extend", start, p), *(("decode", s, s + 1) for s in range(p, len(ids) - 1))]
        ):
            number = 10_000 * i + tag + 1
            plan = ForwardPlan(
                number, mode, [f"t{i}"], [at], [end], [mode == "decode"], [0], [p],
                [Context(np.array(text.prompt), None) if mode == "extend" else None], end - at,
            )  # fmt: skip
            recorder.launch(plan)
            plan.selected = {}
            plan.rows = {POINT: torch.from_numpy(text.rows[at:end].astype(np.float32))}
            ended = end == len(ids) - 1
            told = RequestEnd(f"t{i}", p, len(text.output), start, 0, "length", list(text.output))
            recorder.commit(number, graph=False, ended=[told] if ended else [])
            if mode == "extend":
                context = Context(np.array(text.prompt), None)
                recorder.publish(f"t{i}", 0, context, length=p, first_new=start, protected=start)
    writer.flush(timeout=30)
    writer.stop()
    records = [
        {
            "rid": f"t{i}",
            "prompt_len": len(t.prompt),
            "output_len": len(t.output),
            "cached_tokens": cached if i else 0,
            "retractions": 0,
            "finish_reason": "length",
            "output_ids": list(t.output),
            "index": i,
            "family": f"f{i}",
            "prompt_ids": list(t.prompt),
            "segments": [{"name": n, "start": s, "end": e} for n, s, e in _segments(t) if e > s],
            "sampling_params": "{}",
        }
        for i, t in enumerate(texts)
    ]
    pq.write_table(pa.Table.from_pylist(records, schema=schema.REQUESTS), path / REQUESTS_FILE)
    manifest = {
        "schema_version": 1,
        "status": "complete",
        "name": path.name,
        "model": {"name": "made-up", "weights_sha256": {"w": "0"}} if model is None else model,
        "hook_points": {POINT: ""},
        "rows_kept": RowsConfig().model_dump(mode="json"),
        "requests_expected": len(texts),
    }
    (path / MANIFEST).write_text(json.dumps(manifest))
    return load_run(path)


def _segments(text: Text) -> list[tuple[str, int, int]]:
    return [("system", 0, text.system), ("user", text.system, len(text.prompt))]
