"""What `verify` asks of telemetry that was recorded while requests were served, and how it is read."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sglang_probe.engine.capture.telemetry import Measured
from sglang_probe.engine.ledger.part import _telemetry_table
from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.run import Run
from sglang_probe.run.telemetry_options import NUMBERS, TelemetryConfig
from sglang_probe.verify.telemetry import telemetry_holds

HEADS, TOP = 2, 3


def measured(forward: int, rids: list[str], positions: list[int]) -> Measured:
    """Two layers; the numbers tell layer, request and head."""
    shape = (2, len(rids), HEADS)
    number = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 100
    numbers = dict.fromkeys(NUMBERS, number) | {n: np.full(shape, 0.2, np.float32) for n in NUMBERS if "mass" in n}
    top = np.tile(np.array(positions)[:, None, None], (2, 1, HEADS, TOP)).astype(np.int32)
    attempts = np.zeros(len(rids), dtype=np.int64)
    weights = np.full((*shape, TOP), 0.3, np.float32)
    return Measured([0, 3], numbers, top, weights, rids, attempts, np.array(positions), forward)


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    """The run of conftest.py with telemetry of its decode steps, the discarded one of `b` among them."""
    run = make_run()
    _write(run, _telemetry_table([measured(2, ["a", "b"], [6, 6]), measured(3, ["a", "b"], [7, 7])]))
    manifest = json.loads((run.path / "manifest.json").read_text())
    manifest |= {"telemetry": TelemetryConfig(every=1, top_k=TOP).model_dump(), "telemetry_layers": [0, 3]}
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    return Run(run.path)


def _write(run: Run, table: pa.Table) -> None:
    """As the writer does it, in the part that is there."""
    (run.path / "telemetry").mkdir(exist_ok=True)
    pq.write_table(table, run.path / "telemetry" / "part-00000.parquet")
    journal = run.path / "journal.jsonl"
    part = json.loads(journal.read_text())
    part["files"]["telemetry/part-00000.parquet"] = ""
    journal.write_text(json.dumps(part) + "\n")


def test_every_decode_step_has_one_row_a_layer(run: Run) -> None:
    check = telemetry_holds(run)
    assert (check.violation, check.covered) == (None, 8)


def test_heads_are_told_apart_when_it_is_read(run: Run) -> None:
    frame = run.telemetry()
    assert len(frame) == 2 * 4 * HEADS
    one = frame.query("rid == 'b' and layer == 3 and position == 7 and head == 1").iloc[0]
    assert one["entropy"] == pytest.approx(0.07)  # layer 1 of 2, request 1 of 2, head 1 of 2
    assert one["step"] == 1
    assert one["forward_id"] == 3
    assert one["top_positions"].tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: f.iloc[1:], "layer 0: a attempt 0 position 6 (forward 2) is missing"),
        (lambda f: f.iloc[[0, *range(len(f))]], "layer 0: a attempt 0 position 6 (forward 2) is there twice"),
        (lambda f: f.assign(forward_id=f["forward_id"] + 1), "was not due"),
        (lambda f: f.assign(rid="a"), "is there twice"),
        (lambda f: f.assign(mass_sinks=[[0.5, 0.2]] * len(f)), "a position 6: weights do not sum to 1"),
        (lambda f: f.assign(top_positions=[[9] * 6] * len(f)), "a top position lies past the step"),
    ],
)
def test_a_step_that_is_missing_or_wrong_is_noticed(run: Run, change: Callable, named: str) -> None:
    table = pq.read_table(run.path / "telemetry" / "part-00000.parquet")
    _write(run, pa.Table.from_pandas(change(table.to_pandas()), schema=table.schema, preserve_index=False))
    violation = telemetry_holds(Run(run.path)).violation
    assert violation is not None
    assert named in violation


def test_a_run_without_telemetry_says_how_to_have_it(make_run: Callable[..., Run]) -> None:
    with pytest.raises(RunDirectoryError, match="has no telemetry"):
        make_run().telemetry()
