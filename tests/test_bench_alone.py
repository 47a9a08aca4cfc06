"""What a benchmark says of a command's memory is the command's."""

from __future__ import annotations

import importlib
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, as the scripts import it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    return importlib.import_module("alone")


def test_the_peak_of_a_command_does_not_begin_at_that_of_the_benchmark(alone: Any) -> None:
    held = np.ones(200 << 20, np.uint8)
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert mine > held.nbytes / 2**20
    small = alone.run_alone([sys.executable, "-S", "-c", "pass"]).peak_mib
    large = alone.run_alone([sys.executable, "-S", "-c", "bytearray(b'1') * (100 << 20)"]).peak_mib
    assert small < 100 < large < 200


def test_a_command_that_fails_ends_the_benchmark(alone: Any) -> None:
    with pytest.raises(SystemExit, match="failed with 3"):
        alone.run_alone([sys.executable, "-c", "raise SystemExit(3)"])
