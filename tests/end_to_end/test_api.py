"""Recording from Python, as a page of the documentation shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_probe import load_run
from sglang_probe.kept_set import KeptFile
from sglang_probe.verify.verify import verify

pytestmark = [pytest.mark.engine, pytest.mark.reviewed("eviction")]
PAGE = Path(__file__).parent.parent.parent / "docs" / "how-to" / "evict-in-the-engine.md"


def run_example(number: int, folder: Path) -> str:
    """What an example of the page prints, run as a script."""
    code = re.findall(r"```python\n(.+?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[number]
    script = folder / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script], cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_eviction_in_the_engine_takes_two_imports(tmp_path: Path) -> None:
    said = run_example(0, tmp_path)
    full, kept = (int(n) for n in re.findall(r": (\d) of 8 answered", said))
    assert full == 8
    assert kept < full
    runs = [load_run(tmp_path / "runs" / name) for name in ("full", "snapkv")]
    for run in runs:
        assert [str(c) for c in verify(run) if not c.holds] == []
    # One engine made both.
    assert runs[0].manifest["server_resolved"] == runs[1].manifest["server_resolved"]
    requests = runs[1].requests()
    assert (requests["evict"] == requests["rid"]).all()
    counts = KeptFile(runs[1].path / "kept.safetensors").counts["r000000"]
    assert set(counts.flatten().tolist()) == {round(228 / 8)}


@pytest.mark.slow
def test_the_likelihood_of_given_tokens_under_a_kept_set(tmp_path: Path) -> None:
    nll, divergence = map(float, re.findall(r"tensor\(([\d.e-]+)\)", run_example(1, tmp_path)))
    assert 0 < nll < 20
    assert 0 < divergence < 20
