"""What is made of a scheduler that ends by an exception: an engine that died, in the exception's words."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from sglang_probe.engine.hooks.config import CRASHED, EngineProbeConfig, fault_file
from sglang_probe.errors import ProbeError
from sglang_probe.harvest.death import RESUME, Children, EngineDied
from sglang_probe.harvest.engine import ProbedEngine
from sglang_probe.harvest.recording import _fix

FAULT = f"{CRASHED}: IndexError: index 7 is out of range"


class Process:
    """Alive at so many looks, and then ended by an exception."""

    exitcode = 1

    def __init__(self, looks: int) -> None:
        self._looks = looks

    def is_alive(self) -> bool:
        self._looks -= 1
        return self._looks >= 0


def _engine(run: Path, replica: int, looks: int) -> ProbedEngine:
    probe = EngineProbeConfig(run=run, replica=replica)
    engine = ProbedEngine("model", probe, {"device": "cpu", "watchdog_timeout": 300})
    engine._folder = tempfile.TemporaryDirectory()
    engine._children = Children([Process(looks)], 300)
    engine._in_flight = {"r1": None}
    return engine


@pytest.mark.parametrize("looks", [0, 1, 5])
def test_a_crash_is_a_death_in_its_own_words_whether_or_not_the_process_is_still_ending(
    tmp_path: Path, looks: int
) -> None:
    """It tells why first, and then writes its last part."""
    (tmp_path / fault_file(1)).write_text(FAULT)
    with pytest.raises(EngineDied) as died:
        _engine(tmp_path, 1, looks).look()
    assert (died.value.message, died.value.fix, died.value.in_flight) == (FAULT, RESUME, ("r1",))


def test_the_crash_of_another_replica_is_none_of_this_one(tmp_path: Path) -> None:
    (tmp_path / fault_file(1)).write_text(FAULT)
    _engine(tmp_path, 0, 5).look()
    _engine(tmp_path, 2, 5).look()


def test_a_recording_that_stopped_in_an_engine_that_lives_is_no_death(tmp_path: Path) -> None:
    (tmp_path / fault_file(0)).write_text("sglang-probe stopped recording in put: OSError: no space")
    with pytest.raises(ProbeError) as stopped:
        _engine(tmp_path, 0, 5).look()
    assert not isinstance(stopped.value, EngineDied)


def test_what_to_do_about_a_crash_is_to_resume_and_not_to_look_at_the_watchdog() -> None:
    assert _fix(None, FAULT) == RESUME
    assert "--resume" in RESUME
    assert "watchdog" not in RESUME
