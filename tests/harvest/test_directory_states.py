"""Every state that a kill can leave a run directory in: what each command makes of it, and that nothing finished is
lost. Processes are forked and kill themselves before one file operation after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.harvest import directory
from sglang_probe.harvest.directory import State, state_of
from sglang_probe.run import journal
from sglang_probe.run.manifest import MANIFEST, write_manifest

CHANGES = ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync", "ftruncate")
"""Functions of `os` through which files change."""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill leaves does not depend on what is on the disk already."""
    monkeypatch.setattr(os, "fsync", lambda _file: None)


def manifest(name: str, **fields: Any) -> dict[str, Any]:
    """Of a run of the one configuration, called `name`."""
    return {"schema_version": 4, "name": name, "model": {"name": "m"}, **fields}


def part(path: Path, name: str) -> None:
    """A durable part that holds the name."""
    number = len(journal.read(path))
    file = f"ledger/spans-{number:05d}.parquet"
    digest = journal.write_durably(path / file, lambda p: p.write_text(name) and None)
    journal.append(path, journal.Part(number, 0, 1, 0, 0, {file: digest}))


def record(path: Path, name: str, *, parts: int = 2, complete: bool = True, **how: bool) -> None:
    """What a harvest does to its directory."""
    how = {"overwrite": False, "resume": False, **how}
    with directory.hold_directory(path):
        directory.settle(path)
        if how["resume"] and state_of(path) is State.COMPLETE:
            return
        directory.open_directory(path, manifest(name), **how)
        try:
            for _ in range(parts):
                part(path, name)
            if complete:
                write_manifest(path, manifest(name, status="complete"))
        finally:
            directory.close_directory(path)


def intact(path: Path, name: str) -> bool:
    """Whether `path` is that run, complete and whole."""
    if state_of(path) is not State.COMPLETE or json.loads((path / MANIFEST).read_text())["name"] != name:
        return False
    files = [f for p in journal.read(path) for f in p.files]
    return bool(files) and all((path / f).read_text() == name for f in files)


def beside(path: Path) -> set[str]:
    """What there is beside a run directory."""
    return {p.name for p in path.parent.iterdir()} - {path.name}


def killed_before(change: int, work: Callable[[], None]) -> bool:
    """Do the work in a process that is killed before its n-th change of a file; whether it came so far."""
    pid = os.fork()
    if pid == 0:
        left = iter(range(change, -1, -1))

        def counted(do: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return do(*args, **kwargs)

            return wrapper

        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def kills(tmp_path: Path, before: Callable[[Path], None], work: Callable[[Path], None]) -> Iterator[Path]:
    """Directories in which `work`, after `before`, was killed at one moment after the other."""
    for change in count():
        path = tmp_path / str(change) / "run"
        path.parent.mkdir()
        before(path)
        went_on = killed_before(change, partial(work, path))
        yield path
        if not went_on:
            assert change > 10, "the kills did not reach the work"
            return


BEFORE: dict[str, Callable[[Path], None]] = {
    "nothing": lambda path: None,
    "an empty folder": lambda path: path.mkdir(),
    "a run without a part": lambda path: record(path, "R", parts=0, complete=False),
    "an incomplete run": lambda path: record(path, "R", complete=False),
    "a complete run": lambda path: record(path, "R"),
    "a complete run that is being replaced": lambda path: _being_replaced(path),
}


def _being_replaced(path: Path) -> None:
    record(path, "R")
    record(path, "X", complete=False, overwrite=True)


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("then", ["resume", "overwrite"])
def test_an_overwrite_that_is_killed_at_any_moment_loses_no_complete_run_and_can_be_gone_on_from(
    before: str, then: str, tmp_path: Path
) -> None:
    had_complete = "complete run" in before and "incomplete" not in before
    for path in kills(tmp_path, BEFORE[before], lambda path: record(path, "N", overwrite=True)):
        aside = path.with_name(".run.replaced")
        if had_complete:
            assert intact(path, "R") or intact(aside, "R") or intact(path, "N")
        record(path, "M", **{then: True})
        assert state_of(path) is State.COMPLETE
        if then == "overwrite":
            assert intact(path, "M")
        assert beside(path) == set()


def test_an_overwrite_without_one_part_puts_back_what_was_there_also_if_it_is_killed_meanwhile(tmp_path: Path) -> None:
    for path in kills(
        tmp_path,
        lambda path: record(path, "R"),
        lambda path: record(path, "N", parts=0, complete=False, overwrite=True),
    ):
        assert intact(path, "R") or intact(path.with_name(".run.replaced"), "R")
    assert intact(path, "R")
    assert beside(path) == set()


def test_an_overwrite_that_fails_later_keeps_both(tmp_path: Path) -> None:
    path = tmp_path / "run"
    record(path, "R")
    record(path, "N", complete=False, overwrite=True)
    assert state_of(path) is State.PARTIAL
    assert intact(tmp_path / ".run.replaced", "R")
    record(path, "N", resume=True)
    assert state_of(path) is State.COMPLETE
    assert beside(path) == set()


def test_what_was_set_aside_before_a_kill_is_not_recorded_over(tmp_path: Path) -> None:
    path = tmp_path / "run"
    record(path, "R")
    path.rename(tmp_path / ".run.replaced")
    with pytest.raises(RunDirectoryError, match="exists already"):
        directory.refuse_existing(path)
    with pytest.raises(RunDirectoryError, match="exists already"):
        record(path, "N")
    assert intact(path, "R")


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=lambda how: str(list(how)))
def test_killed_before_the_first_manifest_counts_as_never_begun(how: dict[str, bool], tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    for leftover in (".manifest.json.tmp", ".lock", ".lock-dp1", ".other.lock"):
        (path / leftover).write_text("{")
    record(path, "N", **how)
    assert state_of(path) is State.COMPLETE


def test_a_run_of_other_sampling_is_not_resumed_and_two_flags_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    write_manifest(path, {**manifest("a"), "sampling": {"max_new_tokens": 100}})
    with pytest.raises(RunDirectoryError, match="another `sampling`"):
        directory.open_directory(
            path, {**manifest("a"), "sampling": {"max_new_tokens": 101}}, overwrite=False, resume=True
        )
    with pytest.raises(ConfigError, match="contradict"):
        directory.refuse_soon(tmp_path / "nothing", overwrite=True, resume=True)


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=lambda how: str(list(how)))
@pytest.mark.parametrize("file", ["thesis.tex", "probe.yaml", "rows", ".bashrc"])
def test_what_is_not_ours_is_never_touched(file: str, how: dict[str, bool], tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / file).write_text("mine")
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        record(path, "N", **how)
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        directory.refuse_soon(path, **{"overwrite": False, "resume": False, **how})
    assert (path / file).read_text() == "mine"
    assert beside(path) == set()


def test_a_segment_of_a_live_recording_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "segment-00000"
    path.mkdir()
    write_manifest(path, manifest("live", status="recording", segment={"number": 0}))
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RunDirectoryError, match="segment of a live recording"):
            record(path, "N", **how)


def test_a_second_process_is_refused_by_the_name_of_the_first_and_only_while_it_lives(tmp_path: Path) -> None:
    path = tmp_path / "run"
    code = (
        "import sys; from pathlib import Path; from sglang_probe.harvest.directory import hold_directory\n"
        "held = hold_directory(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RunDirectoryError, match=rf"another process records into .*process {other.pid} on "):
            record(path, "N", **how)
        with pytest.raises(RunDirectoryError, match=rf"another process records into .*process {other.pid} on "):
            directory.refuse_soon(path, **{"overwrite": False, "resume": False, **how})
    assert not path.exists()
    other.kill()
    other.wait()
    record(path, "N")
    assert beside(path) == set()


def test_a_resumed_run_knows_what_was_refused_and_what_ended_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "run"
    ended = {"a": {"alone": False, "reason": "why"}, "b": {"alone": True, "reason": "why"}}
    record(path, "N", complete=False)
    told = {"starts": [{"seconds": 1.0, "requests": 2}], "refused": {"c": "too long"}, "ended_engine": ended}
    write_manifest(path, manifest("N", status="incomplete", **told))
    for _ in range(2):  # killed right after it was opened, it knows it still
        start = directory.open_directory(path, manifest("N"), overwrite=False, resume=True)
        assert start.number == 1
        assert dict(start.suspects) == {"a": "why"}
        assert start.refused.keys() == {"b", "c"}
        assert "served alone: why" in start.refused["b"]


def test_every_state_of_the_docstring_is_reached_by_some_kill(tmp_path: Path) -> None:
    """Negative control of the kills above: they are spread over the steps."""
    seen = [
        (state_of(path), state_of(path.with_name(".run.replaced")))
        for path in kills(tmp_path, lambda path: record(path, "R"), lambda path: record(path, "N", overwrite=True))
    ]
    steps = [a for a, b in pairwise([*seen, None]) if a != b]
    complete, nothing = State.COMPLETE, State.NOTHING
    assert steps == [
        (complete, nothing),
        (nothing, complete),
        (State.EMPTY, complete),
        (State.STARTED, complete),
        (State.PARTIAL, complete),
        (complete, complete),
        (complete, nothing),
    ]
