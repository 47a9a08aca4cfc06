"""A small run directory made by the real recorder and writer, with a made-up engine behind them."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from sglang_probe.run.selection import RowsConfig, Selected

EMBEDDING = torch.randn((50, 8), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
EVERYTHING = RowsConfig()
QUERY = "blocks.0.attn.hook_rot_q"
PROMPTS = {"a": [3, 4, 5, 6, 7, 8], "b": [3, 4, 5, 6, 9, 10]}
OUTPUTS = {"a": [11, 12, 13], "b": [14, 1]}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """Request `a` is computed; `b` reuses its first four positions and stops one step before a discarded step.

    The row of a query is made of its position and token, so that it shows whose it is. With `cache=False`, `b` reuses
    nothing.
    """
    selected_points = ("hook_embed", QUERY)

    def make(name: str = "run", rows: RowsConfig = EVERYTHING, *, cache: bool = True) -> Run:
        path = tmp_path / name
        path.mkdir()
        selected = Selected(rows, selected_points)
        reused = 4 if cache else 0
        writer = Writer(path)
        recorder = Recorder(writer, lineage=Lineage(1, 1000), captures_rows=True)

        def launch(tag: int, mode: str, *asked: tuple[str, int, int]) -> None:
            plan = ForwardPlan(
                tag,
                mode,
                [r for r, _, _ in asked],
                [s for _, s, _ in asked],
                [e for _, _, e in asked],
                [mode == "decode"] * len(asked),
                [0] * len(asked),
                [6] * len(asked),
                [None if mode == "decode" else Context(np.array(PROMPTS[r]), None) for r, _, _ in asked],
                sum(e - s for _, s, e in asked),
            )
            recorder.launch(plan)
            ids = [(PROMPTS[r] + OUTPUTS[r])[p] for r, s, e in asked for p in range(s, e)]
            places = [p for _, s, e in asked for p in range(s, e)]
            positions = torch.tensor([[p, i, 1, p] for p, i in zip(places, ids, strict=True)]).to(torch.bfloat16)
            plan.selected = selected.offsets(plan.starts, plan.ends, plan.prompt_lens)
            captured = {"hook_embed": EMBEDDING[ids], QUERY: positions}
            plan.rows = {
                h: x[plan.selected[h]] if h in plan.selected else x
                for h, x in captured.items()
                if h not in plan.selected or len(plan.selected[h])
            }

        def end(rid: str, cached: int, reason: str) -> RequestEnd:
            return RequestEnd(rid, 6, len(OUTPUTS[rid]), cached, 0, reason, OUTPUTS[rid])

        launch(1, "extend", ("a", 0, 6))
        recorder.commit(1, graph=False)
        if cache:
            recorder.publish("a", 0, Context(np.array(PROMPTS["a"]), None), length=6, first_new=0, protected=0)
        launch(2, "extend", ("b", reused, 6))
        recorder.commit(2, graph=False)
        launch(3, "decode", ("a", 6, 7), ("b", 6, 7))
        launch(4, "decode", ("a", 7, 8), ("b", 7, 8))
        recorder.commit(3, graph=False, ended=[end("b", reused, "stop")])
        recorder.commit(4, graph=False, ended=[end("a", 0, "length")])
        writer.flush(timeout=30)

        segments = [{"name": "system", "start": 0, "end": 4}, {"name": "user", "start": 4, "end": 6}]
        records = [
            {
                "rid": rid,
                "prompt_len": 6,
                "output_len": len(OUTPUTS[rid]),
                "cached_tokens": reused if rid == "b" else 0,
                "retractions": 0,
                "finish_reason": "stop" if rid == "b" else "length",
                "output_ids": OUTPUTS[rid],
                "index": index,
                "family": "f",
                "prompt_ids": PROMPTS[rid],
                "segments": segments,
                "sampling_params": "{}",
            }
            for index, rid in enumerate("ab")
        ]
        pq.write_table(pa.Table.from_pylist(records, schema=schema.REQUESTS), path / REQUESTS_FILE)
        manifest = {
            "schema_version": 1,
            "status": "complete",
            "hook_points": dict.fromkeys(selected_points, ""),
            "rows_kept": rows.model_dump(mode="json"),
            "requests_expected": 2,
        }
        (path / MANIFEST).write_text(json.dumps(manifest))
        return load_run(path)

    return make
