"""Files of rows that wait: bounded in size, time and number, and nobody's rows go for another's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_probe.engine.live import answer_files as module
from sglang_probe.engine.live.answer_files import EXPIRED, FETCHED, FULL, GONE, SUFFIX, AnswerFiles, clear
from sglang_probe.engine.live.config import AnswersConfig
from sglang_probe.errors import RunDirectoryError

KILO = b"x" * 1000


@pytest.fixture
def files(tmp_path: Path) -> Iterator[AnswerFiles]:
    made = AnswerFiles(tmp_path / "dp0", AnswersConfig(megabytes=0.003, most_megabytes=0.001, seconds=100))
    yield made
    made.close()


def add(files: AnswerFiles, *names: str) -> list[bool]:
    return [files.add(name, len(KILO), lambda path: path.write_bytes(KILO) and None) for name in names]


def there(folder: Path) -> set[str]:
    return {p.stem for p in folder.glob(f"*{SUFFIX}")}


def fetched(folder: Path, *names: str) -> None:
    """What the process that serves HTTP leaves."""
    for name in names:
        (folder / FETCHED / name).touch()


def test_what_was_not_fetched_goes_for_nobody(files: AnswerFiles, tmp_path: Path) -> None:
    assert add(files, *"abcd") == [True, True, True, False]
    assert there(tmp_path / "dp0") == {*"abc"}
    assert (tmp_path / "dp0" / f"d{GONE}").read_text() == FULL
    fetched(tmp_path / "dp0", "b")
    assert add(files, "e") == [True]
    assert there(tmp_path / "dp0") == {*"ace"}
    assert (tmp_path / "dp0" / f"b{GONE}").read_text() == EXPIRED
    assert files.used("b")


def test_what_was_fetched_stays_until_room_is_needed(files: AnswerFiles, tmp_path: Path) -> None:
    add(files, *"abc")
    fetched(tmp_path / "dp0", *"ab")
    files.expire()
    assert there(tmp_path / "dp0") == {*"abc"}
    add(files, "d")
    assert there(tmp_path / "dp0") == {*"bcd"}  # the oldest first


def test_age_takes_an_answer_away_and_later_its_mark(
    files: AnswerFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(files, "a")
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 101)
    files.expire()
    assert not there(tmp_path / "dp0")
    assert files.used("a")
    monkeypatch.setattr(module.time, "time", lambda: now + 4000)
    files.expire()
    assert [p.name for p in (tmp_path / "dp0").iterdir()] == [FETCHED]
    assert not files.used("a")


def test_files_and_marks_are_bounded_in_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 3)
    files = AnswerFiles(tmp_path / "dp0", AnswersConfig())
    assert add(files, *"abcd") == [True, True, True, False]
    for i in range(10):
        files.mark(str(i), EXPIRED)
    assert {p.stem for p in (tmp_path / "dp0").glob(f"*{GONE}")} == {"7", "8", "9"}


def test_nothing_is_listed_for_an_answer(files: AnswerFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing takes as long as there are files, marks among them."""

    def refuse(*_args: object) -> None:
        raise AssertionError("the folder was listed")

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(Path, "glob", refuse)
    assert add(files, *"abc") == [True] * 3
    files.expire()


def test_a_write_that_fails_leaves_nothing(files: AnswerFiles, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(KILO)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        files.add("a", 1000, fail)
    assert [p.name for p in (tmp_path / "dp0").iterdir()] == [FETCHED]
    assert not files.used("a")


def test_a_start_clears_its_rank_and_those_that_are_no_more_but_not_what_another_server_has(tmp_path: Path) -> None:
    for rank in (0, 1, 2, 10):
        (tmp_path / f"dp{rank}").mkdir()
    other = AnswerFiles(tmp_path / "dp3", AnswersConfig())
    clear(tmp_path, 1, 2)
    assert {p.name for p in tmp_path.glob("dp*") if p.is_dir()} == {"dp0", "dp2", "dp3", "dp10"}
    clear(tmp_path, 0, 2)
    assert {p.name for p in tmp_path.glob("dp*") if p.is_dir()} == {"dp3"}
    with pytest.raises(RunDirectoryError, match="another server keeps rows"):
        AnswerFiles(tmp_path / "dp3", AnswersConfig())
    other.close()
    assert not list(tmp_path.iterdir())
