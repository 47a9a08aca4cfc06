"""The writer thread: parts complete in themselves, back-pressure by bytes, errors that reach the recorder."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sglang_probe.engine.ledger.recorder import Commit
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.run import journal


def commit(forward: int, rows: int = 4) -> Commit:
    span = ("a", 0, forward, forward + 1, "computed", "decode", forward, -1, None, forward * rows, 1, None, None)
    facts = (forward, "decode", 1, 0, rows, rows, False, 0.0, 0.0, 0, forward * rows, 0, 0)
    values = {"hook_embed": torch.full((rows, 8), float(forward))}
    return Commit(forward=facts, rows=values, numbered=rows, spans=[span])


def test_rows_and_facts_of_a_part_end_together(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    for f in range(3):
        writer.put(commit(f))
    writer.flush(10)
    for f in range(3, 5):
        writer.put(commit(f))
    writer.flush(10)
    parts = journal.read(tmp_path)
    assert [(p.forwards_end, p.rows_end, p.rows) for p in parts] == [(3, 12, 12), (5, 20, 8)]
    second = load_file(tmp_path / "rows/hook_embed/shard-00001.safetensors")["rows"]
    assert second[:, 0].tolist() == [3.0] * 4 + [4.0] * 4


def test_a_part_is_closed_after_its_time_without_being_asked(tmp_path: Path) -> None:
    writer = Writer(tmp_path, part_seconds=0.05)
    time.sleep(0.1)
    for f in range(200):
        writer.put(commit(f))
    deadline = time.time() + 10
    while not journal.read(tmp_path) and time.time() < deadline:
        time.sleep(0.02)
    assert journal.read(tmp_path)


def test_waiting_rows_are_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_probe.engine.ledger.writer._BUNDLE_COMMITS", 1)
    gate = threading.Event()
    monkeypatch.setattr(Writer, "_take", lambda self, c: gate.wait(10) and None)
    writer = Writer(tmp_path, max_waiting_bytes=3 * commit(0).rows["hook_embed"].nbytes)  # type: ignore[index]
    done = []

    def produce() -> None:
        for f in range(6):
            writer.put(commit(f))
            done.append(f)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    thread.join(0.3)
    assert len(done) == 3, "the fourth commit must wait"
    gate.set()
    thread.join(10)
    assert len(done) == 6


def test_an_error_of_the_thread_reaches_the_next_put(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("in the way")
    writer = Writer(tmp_path)
    writer.put(commit(0))
    with pytest.raises(OSError, match="the writer stopped"):
        writer.flush(10)
    with pytest.raises(OSError, match="the writer stopped"):
        writer.put(commit(1))
