"""`make bench-gpu` where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def _bench(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/gpu.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_a_sentence_and_runs_nothing(tmp_path: Path) -> None:
    done = _bench("--out", tmp_path / "gpu")
    assert done.returncode == 1
    assert done.stderr.startswith("bench-gpu needs an NVIDIA GPU that PyTorch can use, and this machine has none")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "gpu").exists()


@pytest.mark.slow
@pytest.mark.engine
def test_the_script_runs_from_end_to_end_in_a_rehearsal(tmp_path: Path) -> None:
    """With a tiny model on the CPU, through the path that rows take on a GPU; what needs one is left out by name."""
    done = _bench("--out", tmp_path, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found) == {"model", "prove", "replay", "deterministic", "overhead", "kernel"}
    assert "rehearsal" in found["replay"]["device"]
    replay = found["replay"]["replay"]
    assert replay["verify with transformers"]["passed"], replay["verify with transformers"]["output"]
    assert replay["share of forwards replayed"]["graphs"]["decode"] == 0  # nothing is replayed on a CPU
    assert set(found["overhead"]["overhead"]["median ratio to stock"]) >= {"ledger", "queries of 4 layers"}
    assert {"skipped"} == set(found["kernel"]["kernel"]) == set(found["deterministic"]["deterministic"])
    again = _bench("--out", tmp_path, "--rehearse")  # nothing is left to run
    assert "..." not in again.stdout
