"""Runs with chosen rows of the residual stream, made by the real recorder and writer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sglang_probe.engine.ledger.facts import Context, ForwardPlan, RequestEnd
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.run import schema
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run

POINT = "blocks.1.hook_resid_post"
WEIGHTS = {"model.safetensors": "c" * 64}
Row = Callable[[str, int], torch.Tensor]
MakeRun = Callable[..., Run]


@pytest.fixture
def rows_run(tmp_path: Path) -> MakeRun:
    """A run of requests with prompts of one length, each computed whole, then decoded together.

    Args of what it returns:
        lengths: prompt and output length by request id.
        row: the row `[d]` of a request's position.
        families: of requests that have one.
        weights: hashes of the model's files.
    """

    def make(
        name: str,
        lengths: Mapping[str, tuple[int, int]],
        row: Row,
        *,
        families: Mapping[str, str] | None = None,
        weights: Mapping[str, str] | None = WEIGHTS,
    ) -> Run:
        path = tmp_path / name
        path.mkdir()
        writer = Writer(path)
        recorder = Recorder(writer, lineage=Lineage(1, 100_000), captures_rows=True)
        tags = iter(range(1, 10_000))

        def forward(mode: str, asked: Sequence[tuple[str, int, int]], ended: Sequence[str] = ()) -> None:
            tag = next(tags)
            plan = ForwardPlan(
                tag,
                mode,
                [r for r, _, _ in asked],
                [s for _, s, _ in asked],
                [e for _, _, e in asked],
                [mode == "decode"] * len(asked),
                [0] * len(asked),
                [lengths[r][0] for r, _, _ in asked],
                [None if mode == "decode" else Context(np.arange(1, e + 1), None) for _, _, e in asked],
                sum(e - s for _, s, e in asked),
            )
            recorder.launch(plan)
            plan.rows = {POINT: torch.stack([row(r, p) for r, s, e in asked for p in range(s, e)])}
            ends = [RequestEnd(r, *lengths[r], 0, 0, "length", list(range(lengths[r][1]))) for r in ended]
            recorder.commit(tag, graph=False, ended=ends)

        longest = max(n for _, n in lengths.values())
        for rid, (prompt, _) in lengths.items():
            forward("extend", [(rid, 0, prompt)], [rid] if lengths[rid][1] == 1 else [])
        for step in range(longest - 1):
            now = [(r, p + step, p + step + 1) for r, (p, n) in lengths.items() if step < n - 1]
            forward("decode", now, [r for r, _, _ in now if lengths[r][1] == step + 2])
        writer.flush(timeout=30)
        records = [
            {
                "rid": rid,
                "prompt_len": prompt,
                "output_len": output,
                "cached_tokens": 0,
                "retractions": 0,
                "finish_reason": "length",
                "output_ids": list(range(output)),
                "index": i,
                "family": (families or {}).get(rid),
                "prompt_ids": [int.from_bytes(rid.encode()[-3:]), *range(1, prompt)],
                "segments": [{"name": "prompt", "start": 0, "end": prompt}],
                "sampling_params": "{}",
            }
            for i, (rid, (prompt, output)) in enumerate(lengths.items())
        ]
        pq.write_table(pa.Table.from_pylist(records, schema=schema.REQUESTS), path / REQUESTS_FILE)
        manifest = {
            "schema_version": 1,
            "status": "complete",
            "name": name,
            "hook_points": {POINT: ""},
            "rows_kept": {},
            "requests_expected": len(lengths),
            "model": {"name": "tiny", "weights_sha256": weights},
        }
        (path / MANIFEST).write_text(json.dumps(manifest))
        return load_run(path)

    return make
