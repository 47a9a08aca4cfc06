"""The process that copies: it ends with the recording, whoever ends that, and nobody waits for it but who wants to."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.errors import RunDirectoryError
from sglang_probe.remote.config import UploadConfig
from sglang_probe.remote.process import Uploading, hold_copy
from sglang_probe.remote.target import Target
from tests.remote.conftest import Recorded
from tests.remote.test_copy import closed_there, whole_there


@pytest.fixture
def to(tmp_path: Path) -> UploadConfig:
    return UploadConfig(to=f"file://{tmp_path}/there/run", patience=20.0)


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_copies_parts_while_they_come_and_the_rest_at_the_end(recorded: Recorded, to: UploadConfig) -> None:
    uploading, there = Uploading(recorded.path, to, single=True), Target(to.to)
    until(lambda: "journal.jsonl" in there.sizes())
    assert not closed_there(there)
    recorded.close()
    state = uploading.finish()
    assert (state["done"], state["error"], state["refused"]) == (True, None, None)
    assert whole_there(there)


def test_what_was_copied_of_a_recording_that_was_killed_stays(recorded: Recorded, to: UploadConfig) -> None:
    uploading = Uploading(recorded.path, to, single=True)
    uploading.end()  # what the death of whoever started it does
    assert uploading._process.wait(120) == 0
    assert not uploading.state()["done"]
    assert "journal.jsonl" in Target(to.to).sizes()


def test_only_one_copies_a_folder(recorded: Recorded) -> None:
    with hold_copy(recorded.path), pytest.raises(RunDirectoryError, match="another process copies"):
        hold_copy(recorded.path)


def test_a_target_that_cannot_be_written_is_in_the_state(recorded: Recorded, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    recorded.close()
    config = UploadConfig(to=f"file://{tmp_path}/a-file/run", patience=0.1)
    state = Uploading(recorded.path, config, single=True).finish()
    assert not state["done"]
    assert "a-file" in state["error"]
