"""Crash safety of the journal: what is named is there, what is torn is cut, what is damaged is refused."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import journal
from sglang_probe.run.journal import Part


def part(number: int) -> Part:
    return Part(number, 0, number + 1, 10 * (number + 1), 10, {f"ledger/spans-{number:05d}.parquet": "0" * 64})


def test_a_torn_last_line_is_ignored_and_does_not_swallow_the_next_part(tmp_path: Path) -> None:
    journal.append(tmp_path, part(0))
    with open(tmp_path / journal.NAME, "a") as f:
        f.write('{"number": 1, "sess')
    assert [p.number for p in journal.read(tmp_path)] == [0]
    journal.append(tmp_path, part(1))
    assert [p.number for p in journal.read(tmp_path)] == [0, 1]


def test_a_damaged_line_in_the_middle_is_an_error_not_an_end(tmp_path: Path) -> None:
    for n in range(3):
        journal.append(tmp_path, part(n))
    path = tmp_path / journal.NAME
    path.write_text(path.read_text().replace('"number": 1', '"number": ?'))
    with pytest.raises(RunDirectoryError, match="damaged"):
        journal.read(tmp_path)


def test_a_part_whose_folder_cannot_be_synced_is_not_named_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.append(tmp_path, part(0))

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    with monkeypatch.context() as failing:
        failing.setattr(journal, "sync_folder", full)
        with pytest.raises(OSError, match="disk full"):
            journal.append(tmp_path, part(1))
    journal.append(tmp_path, part(1))
    assert [p.number for p in journal.read(tmp_path)] == [0, 1]


def test_files_that_no_part_names_are_left_overs(tmp_path: Path) -> None:
    journal.append(tmp_path, part(0))
    for n in (0, 1):
        journal.write_text_durably(tmp_path / f"ledger/spans-{n:05d}.parquet", "x")
    assert journal.discard_leftovers(tmp_path) == ["ledger/spans-00001.parquet"]
    assert (tmp_path / "ledger/spans-00000.parquet").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    journal.write_text_durably(tmp_path / "a", "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        journal.write_durably(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old"


def test_ranks_keep_journals_of_their_own_and_are_read_together(tmp_path: Path) -> None:
    one, ten = (Part(0, 0, 1, 1, 1, {}, dp_rank=rank) for rank in (1, 10))
    for p in (ten, part(0), one):
        journal.append(tmp_path, p)
    assert journal.read(tmp_path) == [part(0), one, ten]
    assert journal.read_rank(tmp_path, 10) == [ten]
    assert [p.stem for p in (part(3), ten)] == ["00003", "dp10-00000"]


def test_a_rank_is_known_by_its_journal_or_by_its_lock(tmp_path: Path) -> None:
    assert journal.ranks(tmp_path / "nothing") == journal.ranks(tmp_path) == [0]
    for name in ("journal.jsonl", "journal-dp2.jsonl", ".lock-dp11", "rows-dp3", "journal-dp4.jsonl.tmp"):
        (tmp_path / name).touch()
    assert journal.ranks(tmp_path) == [0, 2, 11]


def test_a_line_that_did_not_become_durable_is_taken_back_so_that_it_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.append(tmp_path, part(0))

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(journal.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append(tmp_path, part(1))
    assert journal.read(tmp_path) == [part(0)]
    journal.append(tmp_path, part(1))
    assert journal.read(tmp_path) == [part(0), part(1)]
