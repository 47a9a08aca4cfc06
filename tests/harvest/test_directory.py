"""`requests.parquet` says what the engine served, also where that is not what was asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from sglang_probe.engine.ledger.facts import Context, ForwardPlan, RequestEnd
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.harvest.requests_table import write_requests
from sglang_probe.run import schema
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify
from sglang_probe.workload.request import Request, SegmentSpan


def test_a_refused_request_is_in_the_ledger_with_the_placeholder_that_was_served(tmp_path: Path) -> None:
    """SGLang runs one token in place of a prompt that its scheduler refuses (found by attack, seed 102)."""
    embedding = torch.randn((50, 8), generator=torch.Generator().manual_seed(0))
    writer = Writer(tmp_path)
    recorder = Recorder(writer, lineage=Lineage(1, 1000), captures_rows=True)
    plan = ForwardPlan(1, "extend", ["a"], [0], [1], [False], [0], [1], [Context(np.array([0]), None)], 1)
    recorder.launch(plan)
    plan.rows = {"hook_embed": embedding[:1]}
    recorder.commit(1, graph=False, ended=[RequestEnd("a", 1, 1, 0, 0, schema.REFUSED, [11])])
    writer.flush(timeout=30)
    manifest = {"schema_version": 1, "status": "complete", "hook_points": {"hook_embed": ""}, "requests_expected": 1}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    run = load_run(tmp_path)

    counts = write_requests(run, [Request(0, "a", (3, 4, 5, 6), (SegmentSpan("user", 0, 4),))])

    assert counts == {schema.REFUSED: 1}
    assert [str(c) for c in verify(run, embedding=embedding) if not c.holds] == []
    first = run.tokens().iloc[0]
    assert (first["token_id"], first["segment"]) == (0, schema.REFUSED)


def test_engine_starts_are_read_from_older_manifests_too() -> None:
    told = [{"seconds": 1.5, "requests": 3}]
    assert schema.starts_of({"sessions": told}) == schema.starts_of({"starts": told}) == told
    assert schema.starts_of({}) == []


def test_a_request_that_was_refused_before_it_was_queued_has_a_row_and_no_position(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(
        json.dumps({"schema_version": 4, "status": "incomplete", "hook_points": {}, "requests_expected": 2})
    )
    run = load_run(tmp_path)
    asked = [Request(i, rid, (3, 4), (SegmentSpan("user", 0, 2),)) for i, rid in enumerate("ab")]

    counts = write_requests(run, asked, refused={"b": "too long"})

    assert counts == {schema.REFUSED: 1}
    (row,) = run.requests().to_dict("records")
    assert (row["rid"], row["index"], row["finish_reason"], row["refusal"]) == ("b", 1, schema.REFUSED, "too long")
    assert (row["prompt_len"], row["output_len"], row["output_ids"], len(row["prompt_ids"])) == (0, 0, None, 0)


def test_a_request_that_ended_the_engine_and_is_refused_now_keeps_what_was_interrupted(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    recorder = Recorder(writer, lineage=Lineage(1, 1000), captures_rows=False)
    plan = ForwardPlan(1, "extend", ["a"], [0], [2], [False], [0], [2], [Context(np.array([3, 4]), None)], 2)
    recorder.launch(plan)
    recorder.commit(1, graph=False)
    writer.flush(timeout=30)
    (tmp_path / MANIFEST).write_text(
        json.dumps({"schema_version": 4, "status": "incomplete", "hook_points": {}, "requests_expected": 1})
    )
    run = load_run(tmp_path)

    counts = write_requests(run, [Request(0, "a", (3, 4), (SegmentSpan("user", 0, 2),))], refused={"a": "ended"})

    assert counts == {schema.INTERRUPTED: 1, schema.REFUSED: 1}
    assert run.requests()["rid"].tolist() == ["a~refused"]
    assert [str(c) for c in verify(run) if not c.holds] == []
