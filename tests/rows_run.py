"""A run directory with rows that a test chooses, written by the real recorder and writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from sglang_probe.run.journal import sha256
from sglang_probe.run.manifest import new_manifest, write_manifest
from sglang_probe.run.run import Run, load_run


@dataclass(frozen=True)
class Text:
    """One request. Its rows are those of all its positions but that of the last output token."""

    prompt: Sequence[int]
    output: Sequence[int] = (0,)
    family: str | None = None
    reuses: tuple[str, int] | None = None
    """Request from which the first so many positions are reused."""
    segments: Sequence[tuple[str, int, int]] = ()
    labels: Sequence[tuple[str, str]] = field(default_factory=list)
    """Axis and class of the whole prompt."""

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.output]


def write_run(
    path: Path,
    texts: Mapping[str, Text],
    rows: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    model: Path | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> Run:
    """Write a run; `rows` has `[positions, D]` by hook point and request."""
    path.mkdir(parents=True)
    writer = Writer(path)
    recorder = Recorder(writer, lineage=Lineage(1, 100_000), captures_rows=True)
    tag = 0

    def launch(mode: str, rid: str, start: int, end: int) -> None:
        nonlocal tag
        tag += 1
        prompt = texts[rid].prompt
        context = None if mode == "decode" else Context(np.array(prompt), None)
        decoding, length = mode == "decode", [len(prompt)]
        plan = ForwardPlan(tag, mode, [rid], [start], [end], [decoding], [0], length, [context], end - start)
        recorder.launch(plan)
        plan.rows = {point: held[rid][start:end] for point, held in rows.items()}

    for rid, text in texts.items():
        _, reused = text.reuses or ("", 0)
        launch("extend", rid, reused, len(text.prompt))
        ended = RequestEnd(rid, len(text.prompt), len(text.output), reused, 0, "length", list(text.output))
        recorder.commit(tag, graph=False, ended=[ended] if len(text.output) == 1 else [])
        if any(t.reuses and t.reuses[0] == rid for t in texts.values()):
            recorder.publish(rid, 0, Context(np.array(text.prompt), None), len(text.prompt), reused, reused)
        for step in range(1, len(text.output)):
            launch("decode", rid, len(text.prompt) + step - 1, len(text.prompt) + step)
            recorder.commit(tag, graph=False, ended=[ended] if step == len(text.output) - 1 else [])
    writer.flush(timeout=30)
    writer.stop()
    records = [_record(i, rid, text) for i, (rid, text) in enumerate(texts.items())]
    pq.write_table(pa.Table.from_pylist(records, schema=schema.REQUESTS), path / REQUESTS_FILE)
    weights = None if model is None else {"model.safetensors": sha256(model / "model.safetensors")}
    manifest = new_manifest(
        name=path.name,
        hook_points=dict.fromkeys(rows, "module"),
        model={"name": "made-up", "weights_sha256": weights, "tokenizer_sha256": None},
        **({} if model is None else {"model_path": str(model)}),
        model_config=dict(model_config or {}),
        requests_expected=len(texts),
    )
    write_manifest(path, {**manifest, "status": "complete"})
    return load_run(path)


def _record(index: int, rid: str, text: Text) -> dict[str, Any]:
    length = len(text.prompt)
    spans = text.segments or [("user", 0, length)]
    return {
        "rid": rid,
        "prompt_len": length,
        "output_len": len(text.output),
        "cached_tokens": (text.reuses or ("", 0))[1],
        "retractions": 0,
        "finish_reason": "length",
        "output_ids": list(text.output),
        "index": index,
        "family": text.family,
        "prompt_ids": list(text.prompt),
        "segments": [{"name": n, "start": a, "end": b} for n, a, b in spans],
        "sampling_params": "{}",
        "labels": [{"axis": a, "name": n, "start": 0, "end": length} for a, n in text.labels] or None,
    }
