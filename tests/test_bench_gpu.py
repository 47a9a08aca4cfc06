"""`make bench-gpu` where there is no GPU."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
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


def test_top_positions_that_differ_are_told_by_whether_their_request_was_rebound() -> None:
    found = runpy.run_path(str(ROOT / "bench/gpu_kit/telemetry.py"))["where_they_differ"]
    places = [("a", 5, [3, 1, 0]), ("a", 1, [1, 3, 0]), ("b", 5, [3, 1, 0]), ("b", 5, [1, 3, 2])]
    rows = [
        {"rid": r, "layer": 0, "head": i, "step": 0, "forward_id": f, "top_positions": np.array(p)}
        for i, (r, f, p) in enumerate(places)
    ]
    online = pd.DataFrame(rows)
    weights = [np.array([0.5, 0.4, 0.1])] * 4
    true = [np.array([1, 3, 0])] * 4  # the first and the third differ; the last in the last place alone
    offline = online.drop(columns="forward_id").assign(top_positions=true, top_weights=weights)
    rebinds = pd.DataFrame([{"rid": "a", "start": 3, "end": 4, "at_forward": 2}])
    told = found(online.assign(top_weights=weights), offline, rebinds)
    assert list(told.values()) == [4, 4, 2, 1, 3, 1, [0.2, 0.2, 0.2, 0.2]]


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


def test_lists_are_timed_beside_the_kernel_in_a_rehearsal() -> None:
    found = runpy.run_path(str(ROOT / "bench/gpu_lists.py"))["measure"](rehearse=True, rounds=1)
    assert set(found["milliseconds"]) == {"kernel", "lists", "lists, with the layout and the plan of a forward"}
    assert max(found["largest error of a weight"].values()) < 1e-5
    assert max(found["largest error of an entropy"].values()) < 5e-2
