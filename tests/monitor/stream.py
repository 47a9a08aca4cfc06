"""Runs of many requests by the real recorder and writer, with made-up rows: usual ones, and from some request on
shifted ones."""

from __future__ import annotations

import json
from pathlib import Path

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

RESID, SCORES, WIDTH, PROMPT = "blocks.0.hook_resid_post", "blocks.0.hook_scores", 8, 3


def make_stream(
    path: Path, requests: int, *, steps: int = 4, shift_from: int | None = None, seed: int = 0, weights: str = "w"
) -> Run:
    """Every request has a prompt of three tokens and `steps` decode steps; from `shift_from` on its rows, and the score
    of its probe, are shifted by two standard deviations of the request's own level."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    writer = Writer(path)
    recorder = Recorder(writer, lineage=Lineage(1, 100 * requests), captures_rows=True)
    records, tag = [], 0
    for i in range(requests):
        rid = f"r{i:05d}"
        level = rng.standard_normal(WIDTH) + (2.0 if shift_from is not None and i >= shift_from else 0.0)
        prompt, output = [2, 3, 4], list(range(10, 10 + steps + 1))
        for start, end in [(0, PROMPT), *((p, p + 1) for p in range(PROMPT, PROMPT + steps))]:
            tag += 1
            decode = start >= PROMPT
            context = None if decode else Context(np.array(prompt), None)
            mode, n = ("decode" if decode else "extend"), end - start
            plan = ForwardPlan(tag, mode, [rid], [start], [end], [decode], [0], [PROMPT], [context], n)
            recorder.launch(plan)
            rows = torch.from_numpy(level + 0.3 * rng.standard_normal((n, WIDTH))).float()
            plan.rows = {RESID: rows, SCORES: rows[:, :1].contiguous()}
            last = end == PROMPT + steps
            ended = [RequestEnd(rid, PROMPT, len(output), 0, 0, "length", output)] if last else []
            recorder.commit(tag, graph=False, ended=ended)
        records.append(
            {
                "rid": rid,
                "prompt_len": PROMPT,
                "output_len": len(output),
                "cached_tokens": 0,
                "retractions": 0,
                "finish_reason": "length",
                "output_ids": output,
                "index": i,
                "family": rid,
                "prompt_ids": prompt,
                "segments": [{"name": "user", "start": 0, "end": PROMPT}],
                "sampling_params": "{}",
            }
        )
    writer.flush(timeout=60)
    pq.write_table(pa.Table.from_pylist(records, schema=schema.REQUESTS), path / REQUESTS_FILE)
    manifest = {
        "schema_version": 1,
        "status": "complete",
        "hook_points": {RESID: "", SCORES: ""},
        "scores": {SCORES: {"watched": "0" * 64}},
        "model": {"name": "m", "weights_sha256": {"model.safetensors": weights}},
        "requests_expected": requests,
    }
    (path / MANIFEST).write_text(json.dumps(manifest))
    return load_run(path)
