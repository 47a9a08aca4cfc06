"""A copy is whole or says that it is not, whatever goes wrong while it is made."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.remote.copy import RunCopy
from sglang_probe.remote.download import download
from sglang_probe.remote.follow import Follower, State
from sglang_probe.remote.target import Target
from sglang_probe.run import journal, seal
from sglang_probe.run.manifest import MANIFEST
from tests.remote.conftest import Faulty, Recorded


class Silent:
    """Nobody is told."""

    def waiting(self, files: int, size: int) -> None: ...

    def moved(self) -> None: ...

    def arrived(self, size: int) -> None: ...


def follower(run: Path, target: Target, **more: Any) -> Follower:
    return Follower(run, target, single=True, pause=0.0, **more)


def finished(run: Path, target: Target, **more: Any) -> State:
    ended = threading.Event()
    ended.set()
    return follower(run, target, **more).run(ended)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def closed_there(target: Target) -> bool:
    manifest = target.read(MANIFEST)
    return manifest is not None and seal.closed(json.loads(manifest))


def whole_there(target: Target) -> bool:
    """Whether every file that the copy's own lists name is there with its hash."""
    manifest, sealed = target.read(MANIFEST), target.read(seal.NAME)
    assert manifest is not None
    names = {**json.loads(manifest)["files"], **json.loads(sealed or b"{}")["files"]}
    return all(journal.hashlib.sha256(target.read(n) or b"").hexdigest() == d for n, d in names.items())


def test_parts_are_there_before_the_run_is_closed(recorded: Recorded, url: str, seen: Target) -> None:
    copy = RunCopy(recorded.path, Target(url))
    assert not copy.turn(Silent())
    first = {n for p in journal.read(recorded.path) for n in p.files}
    assert set(seen.sizes()) == {*first, MANIFEST, journal.NAME}
    recorded.part()
    copy.turn(Silent())
    assert seen.read(journal.NAME) == (recorded.path / journal.NAME).read_bytes()
    assert not closed_there(seen)


def test_a_closed_run_arrives_whole_and_its_manifest_last(recorded: Recorded, url: str, seen: Target) -> None:
    recorded.close()
    target, order = Target(url), []
    written = target._written

    def note(name: str, size: int, write: Callable[[str], None]) -> None:
        written(name, size, write)
        order.append(name)

    target._written = note  # type: ignore[method-assign]
    assert finished(recorded.path, target).done
    assert order[-2:] == [seal.NAME, MANIFEST]
    assert closed_there(seen)
    assert whole_there(seen)


def test_what_is_there_is_not_copied_again(recorded: Recorded, url: str) -> None:
    finished(recorded.path, Target(url), patience=0.01)
    recorded.part()
    recorded.close()
    assert finished(recorded.path, Target(url)).files == 3  # two files of the new part, and the requests
    assert finished(recorded.path, Target(url)).files == 0


@pytest.mark.parametrize("seed", range(6))
def test_a_target_that_fails_at_random_gets_everything_and_never_shows_half(
    recorded: Recorded, url: str, seen: Target, seed: int
) -> None:
    target, draw = Target(url), random.Random(seed)
    Faulty(target, lambda _: draw.random() < 0.5)
    copying = follower(recorded.path, target)
    for close in (False, True):
        if close:
            recorded.part()
            recorded.close()
        for _ in range(200):
            whole = copying.turn(closed_too=True)
            named = {n for p in journal.read(recorded.path) for n in p.files}
            sizes = {n: s for n, s in seen.sizes().items() if n in named}
            assert all(s == (recorded.path / n).stat().st_size for n, s in sizes.items())
            assert not closed_there(seen) or whole_there(seen)
            if whole or (not close and copying.state.error is None):
                break
    assert whole
    assert whole_there(seen)


def test_a_target_that_is_down_is_given_up_and_said(recorded: Recorded, url: str) -> None:
    recorded.close()
    target = Target(url)
    faulty = Faulty(target, lambda _: True)
    state = finished(recorded.path, target, patience=2.5, clock=lambda: float(faulty.writes))  # a second a try
    assert not state.done
    assert state.error == "ConnectionError: the target went away"
    assert state.waiting == 5
    assert faulty.writes > 1
    assert finished(recorded.path, Target(url)).done


def test_a_target_that_is_slow_is_waited_for_while_it_moves(recorded: Recorded) -> None:
    recorded.close()
    now = [0.0]
    target = Target("memory://slow/run")
    put = target.put

    def slow(file: Path, name: str, moved: Callable[[], None] = lambda: None) -> None:
        for _ in range(3):
            now[0] += 9.0
            moved()
        put(file, name)

    target.put = slow  # type: ignore[method-assign]
    assert finished(recorded.path, target, patience=10.0, clock=lambda: now[0]).done


def test_a_driver_that_never_comes_back_is_given_up(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded.close()
    target, released = Target("memory://hangs/run"), threading.Event()

    def hang(_write: int) -> bool:
        released.wait()
        return True

    Faulty(target, hang)
    monkeypatch.setattr("sglang_probe.remote.follow._STUCK", 0.0)
    state = finished(recorded.path, target, patience=0.5)
    released.set()
    assert not state.done
    assert "hangs" in str(state.error)


def test_a_target_that_is_down_is_no_error_before_its_first_use() -> None:
    down = Target("ftp://127.0.0.1:1/run")  # this driver connects when it is made
    with pytest.raises(ConnectionRefusedError):
        down.sizes()


def test_no_password_is_told(recorded: Recorded) -> None:
    recorded.close()
    state = finished(recorded.path, Target("ftp://me:hunter2@127.0.0.1:1/run?sig=hunter2"), patience=0.1)
    assert state.to == "ftp://me:***@127.0.0.1:1/run?***"
    assert state.error is not None
    assert "hunter2" not in repr(state)


def test_the_top_of_a_store_is_no_folder_of_this_machine() -> None:
    assert Target("memory://")._fs.protocol == "memory"


def test_a_run_that_is_resumed_takes_its_copy_with_it(recorded: Recorded, url: str, seen: Target) -> None:
    recorded.close("incomplete")
    copying = follower(recorded.path, Target(url))
    assert copying.turn()
    (recorded.path / MANIFEST).write_text(json.dumps({"schema_version": 1, "status": "incomplete"}))
    recorded.part()
    copying.turn()
    assert not closed_there(seen)
    recorded.close()
    assert copying.turn()
    assert whole_there(seen)


@pytest.mark.parametrize("fails_from", range(1, 8))
def test_a_copy_that_is_replaced_says_at_no_moment_that_it_is_whole_when_it_is_not(
    recorded: Recorded, url: str, seen: Target, fails_from: int
) -> None:
    recorded.close("incomplete")
    finished(recorded.path, Target(url))
    recorded.part()
    recorded.close()  # resumed and closed again, while nobody copied
    target = Target(url)
    Faulty(target, lambda n: n >= fails_from)
    follower(recorded.path, target).turn()
    assert not closed_there(seen) or whole_there(seen)
    assert finished(recorded.path, Target(url)).done
    assert whole_there(seen)


@pytest.mark.parametrize("closed", [False, True])
def test_another_run_is_not_mixed_with_the_one_that_is_there(
    recorded: Recorded, url: str, seen: Target, tmp_path: Path, closed: bool
) -> None:
    recorded.close()
    finished(recorded.path, Target(url))
    before = {n: seen.read(n) for n in seen.sizes()}
    other = Recorded(tmp_path / "other")
    other.part("others")
    if closed:
        other.close()
    state = finished(other.path, Target(url), patience=0.01)
    assert "holds another run" in str(state.refused)
    assert {n: seen.read(n) for n in seen.sizes()} == before
    other.close()
    assert finished(other.path, Target(url), overwrite=True).done
    assert set(seen.sizes()) == set(contents(other.path))
    assert whole_there(seen)


def test_a_folder_of_other_files_is_left_alone(recorded: Recorded, url: str, seen: Target) -> None:
    seen.put_bytes(b"mine", "thesis.tex")
    state = finished(recorded.path, Target(url), overwrite=True)
    assert "thesis.tex is no file of a run" in str(state.refused)
    assert list(seen.sizes()) == ["thesis.tex"]


def test_a_run_that_was_closed_before_the_recording_is_left_alone_until_its_end(recorded: Recorded, url: str) -> None:
    recorded.close()
    target = Target(url)
    copying = follower(recorded.path, target)
    assert not copying.turn(closed_too=False)
    assert target.sizes() == {}


def test_segments_are_copied_side_by_side_and_a_damaged_one_holds_up_no_other(
    tmp_path: Path, url: str, seen: Target
) -> None:
    for number in range(3):
        run = Recorded(tmp_path / f"live/segment-{number:05d}")
        run.part(str(number))
        if number < 2:
            run.close()
    (tmp_path / "live/segment-00000/journal.jsonl").write_text("{}\n")
    copying = Follower(tmp_path / "live", Target(url), single=False, pause=0.0)
    assert not copying.turn()
    assert "segment-00000" in str(copying.state.error)
    names = set(seen.sizes())
    assert f"segment-00001/{seal.NAME}" in names
    assert f"segment-00002/{journal.NAME}" in names
    assert not any(n.startswith("segment-00000") for n in names)


def test_a_download_is_the_run_bit_for_bit(recorded: Recorded, url: str, tmp_path: Path) -> None:
    recorded.close()
    finished(recorded.path, Target(url))
    assert download(Target(url), tmp_path / "back") == {"": "complete"}
    assert contents(tmp_path / "back") == contents(recorded.path)


def test_a_download_of_what_was_not_closed_has_every_part_that_its_journal_names(
    recorded: Recorded, url: str, tmp_path: Path
) -> None:
    (recorded.path / "kept.safetensors").write_text("kept")
    follower(recorded.path, Target(url)).turn()
    assert download(Target(url), tmp_path / "back") == {"": "incomplete"}
    assert contents(tmp_path / "back") == contents(recorded.path)


def test_a_download_refuses_a_file_that_was_changed(recorded: Recorded, url: str, tmp_path: Path) -> None:
    recorded.close()
    finished(recorded.path, Target(url))
    name = next(n for n in Target(url).sizes() if n.startswith("rows/"))
    Target(url).put_bytes(b"x" * Target(url).sizes()[name], name)
    with pytest.raises(RunDirectoryError, match=r"rows/.* is not what was recorded"):
        download(Target(url), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    RunCopy(recorded.path, Target(url))._target.put(recorded.path / name, name)
    assert download(Target(url), tmp_path / "back")


def test_what_an_interrupted_download_of_another_run_left_is_not_part_of_this_one(
    recorded: Recorded, url: str, tmp_path: Path
) -> None:
    recorded.close()
    finished(recorded.path, Target(url))
    left = tmp_path / ".back.partial"
    (left / "rows" / "hook_embed").mkdir(parents=True)
    (left / "rows" / "hook_embed" / "shard-of-another.safetensors").write_text("another run's")
    (left / "journal-dp1.jsonl").write_bytes((recorded.path / journal.NAME).read_bytes())
    download(Target(url), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(recorded.path)


@pytest.mark.parametrize("text", ["[]", "17", "{"])
def test_a_download_of_what_has_no_manifest_says_so(
    recorded: Recorded, seen: Target, tmp_path: Path, text: str
) -> None:
    seen.put_bytes(text.encode(), MANIFEST)
    with pytest.raises(RunDirectoryError, match="damaged"):
        download(seen, tmp_path / "back")


def test_nothing_is_fetched_to_outside_of_the_folder(seen: Target, tmp_path: Path) -> None:
    class Strange(Target):
        def sizes(self, within: str = "") -> dict[str, int]:
            return {MANIFEST: 2, "../../evil/manifest.json": 2}

    with pytest.raises(RunDirectoryError, match="outside"):
        download(Strange(seen.url), tmp_path / "back")


def test_a_protocol_without_its_driver_is_refused_with_the_name_of_the_driver() -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        Target("nosuch://bucket/run")
