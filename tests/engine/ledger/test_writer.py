"""The writer thread: parts complete in themselves, back-pressure by bytes, errors that reach the recorder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sglang_probe.engine.ledger import part
from sglang_probe.engine.ledger.facts import Commit
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import journal


def commit(forward: int, rows: int = 4) -> Commit:
    span = ("a", 0, forward, forward + 1, "computed", "decode", forward, -1, None, forward * rows, 1, *[None] * 3)
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


class Clock:
    """Time that passes when the test says so, and a writer whose turns the test takes in place of the thread."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **options: float) -> None:
        monkeypatch.setattr("sglang_probe.engine.ledger.writer.threading.Thread", NoThread)
        self.now, self.path = 100.0, path
        self.writer = Writer(path, clock=lambda: self.now, **options)

    def until(self, now: float) -> None:
        """The thread runs at `now`, if it would: it was called, or a part is due."""
        self.now = now
        if self.writer._called() or now >= self.writer._due:
            self.writer._turn()

    def durable(self) -> int:
        """Forward passes on disk."""
        return journal.read(self.path)[-1].forwards_end if journal.read(self.path) else 0


class NoThread:
    def __init__(self, **_options: object) -> None: ...

    def start(self) -> None: ...


@pytest.mark.parametrize("a_second", [0.2, 5, 63, 65, 1000], ids=lambda n: f"{n} commits a second")
def test_what_was_handed_over_is_durable_within_part_seconds_whatever_the_load(
    a_second: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle, steady and slow, just below and above a bundle a second, and busy."""
    clock = Clock(tmp_path, monkeypatch, part_seconds=1.0)
    start, ticks = clock.now, 600
    put_at: list[float] = []
    for tick in range(ticks):  # of 10 ms
        clock.until(start + tick / 100)
        while len(put_at) < a_second * tick / 100:
            clock.writer.put(commit(len(put_at)))
            put_at.append(clock.now)
        if clock.durable() < len(put_at):
            assert clock.now - put_at[clock.durable()] <= 1.0 + 0.011
    assert len(put_at) > 1
    assert len(journal.read(tmp_path)) <= 6 + 1


def test_the_scheduler_wakes_the_thread_once_per_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(tmp_path, monkeypatch)
    woken = []
    monkeypatch.setattr(clock.writer._work, "notify", lambda: woken.append(clock.writer.waiting))
    for f in range(63):
        clock.writer.put(commit(f))
    assert woken == []
    clock.writer.put(commit(63))
    assert woken == [64]


def test_a_lonely_commit_becomes_durable_without_another_one_and_without_being_asked_for(tmp_path: Path) -> None:
    writer = Writer(tmp_path, part_seconds=0.05)
    writer.put(commit(0))
    eventually(lambda: bool(journal.read(tmp_path)))


def test_a_directory_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_probe.run.journal.lock.__kwdefaults__", {"wait": 0.0})
    first = Writer(tmp_path)
    other_rank = Writer(tmp_path, dp_rank=1)
    with pytest.raises(RunDirectoryError, match=rf"another process writes into .*process {os.getpid()} on "):
        Writer(tmp_path)
    first.put(commit(0))
    first.flush(10)
    first.stop()
    other_rank.stop()
    eventually(lambda: not list(tmp_path.glob(".lock*")))
    second = Writer(tmp_path)
    second.put(commit(1))
    second.flush(10)
    assert [p.number for p in journal.read(tmp_path)] == [0, 1]


class FullDisk:
    """Takes the first part that is written and no other, until there is room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
        self.room = False
        self.refused = 0
        holder, name = (journal, "append") if at == "the journal" else (part, f"_save_{at}")
        write = getattr(holder, name)

        def limited(*args: object) -> object:
            if self.room:
                return write(*args)
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(holder, name, limited)


@pytest.mark.parametrize("at", ["rows", "table", "the journal"])
def test_a_part_that_a_full_disk_does_not_take_is_tried_again(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(tmp_path, monkeypatch, part_seconds=1.0, patience=10.0)
    disk = FullDisk(monkeypatch, at)
    clock.writer.put(commit(0))
    clock.until(101)
    assert disk.refused == 1
    assert "No space left" in str(clock.writer.failing)
    for f in range(1, 200):  # goes on taking, and does not try more often than once a second
        clock.writer.put(commit(f))
        clock.until(101.5)
    assert disk.refused == 1
    clock.until(102)
    assert disk.refused == 2
    disk.room = True
    clock.until(103)
    clock.until(104)
    assert clock.writer.failing is None
    assert clock.durable() == 200
    parts = journal.read(tmp_path)
    assert [p.number for p in parts] == list(range(len(parts)))
    assert sum(p.rows for p in parts) == 200 * 4
    assert parts[-1].rows_end == 200 * 4


@pytest.mark.parametrize("stopped", [False, True], ids=["asked for", "stopped"])
def test_what_was_handed_over_while_the_disk_was_full_is_durable_when_that_is_told(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(tmp_path, monkeypatch, part_seconds=1.0, patience=10.0)
    disk = FullDisk(monkeypatch, "the journal")
    clock.writer.put(commit(0))
    clock.until(101)
    assert disk.refused == 1
    clock.writer.put(commit(1))  # after the part that waits
    done = clock.writer.checkpoint()
    if stopped:
        clock.writer.stop()
    disk.room = True
    clock.now = 102
    turns = 0
    while not done.is_set() and turns < 3:
        assert clock.writer._called() or clock.now >= clock.writer._due
        goes_on, turns = clock.writer._turn(), turns + 1
    assert done.is_set()
    assert clock.durable() == 2
    assert goes_on is not stopped


def test_patience_with_a_full_disk_ends_and_its_files_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(tmp_path, monkeypatch, part_seconds=1.0, patience=10.0)
    FullDisk(monkeypatch, "table")
    clock.writer.put(commit(0))
    clock.until(101)
    for second in range(102, 111):
        clock.until(second)
        assert clock.writer.error is None
    clock.until(112)
    with pytest.raises(OSError, match=r"the writer stopped: .*No space left"):
        clock.writer.put(commit(1))
    assert [p for p in (tmp_path / "rows").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "not yours"), ValueError("a fault of ours")])
def test_what_nobody_can_mend_is_not_tried_again(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(tmp_path, monkeypatch, part_seconds=1.0, patience=10.0)

    def refuse(*_args: object) -> None:
        raise error

    monkeypatch.setattr(part, "_save_table", refuse)
    clock.writer.put(commit(0))
    clock.until(101)
    assert clock.writer.error is error


def test_a_real_file_system_that_is_full_is_known_as_that_whoever_writes(tmp_path: Path) -> None:
    """safetensors and Arrow tell it in ways of their own; a limit on the size of files is as good as a disk."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "import pyarrow as pa, torch\n"
        "from sglang_probe.engine.ledger import part\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "big = torch.rand(1 << 14)\n"
        "for write in (lambda p: part._save_rows(p, big, None, 0),\n"
        "              lambda p: part._save_table(p, pa.table({'x': big.numpy()}))):\n"
        "    try:\n"
        "        write(Path(sys.argv[1]) / 'rows' / 'x')\n"
        "    except OSError as e:\n"
        "        print(e.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(errno.EFBIG)] * 2, done.stderr
    assert list((tmp_path / "rows").iterdir()) == []


def test_waiting_rows_are_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(part.OpenPart, "take", lambda self, c: gate.wait(10) and None)
    writer = Writer(tmp_path, bundle=1, max_waiting_bytes=3 * commit(0).rows["hook_embed"].nbytes)  # type: ignore[index]
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


def eventually(happened: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_reads_commits_is_told_when_it_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", NoThread)
    now, told = [0.0], []

    def read(_commit: Commit, late: bool) -> None:
        told.append(late)
        now[0] += 0.0 if late else 2.0

    def turn(n: int) -> list[bool]:
        told.clear()
        for f in range(n):
            writer.put(commit(f))
        writer.checkpoint()
        writer._turn()
        return list(told)

    writer = Writer(tmp_path, clock=lambda: now[0], read=read, room=8, part_seconds=100)
    assert turn(7) == [True, True, False, False, False, True, True]  # 6 and 5 wait behind two; then it took 6 s
    (tmp_path / "b").mkdir()
    writer = Writer(tmp_path / "b", clock=lambda: now[0], read=read, max_waiting_bytes=3 * 128)
    assert turn(2) == [True, True]  # more than half of the bytes wait
    assert turn(1) == [False]
