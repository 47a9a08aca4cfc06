"""`sglang-probe vector make` from two files of prompts, through a real engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_probe import load_run
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.steering.library import Library
from sglang_probe.verify.verify import verify
from tests.end_to_end.steering import MODEL, POINTS

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def _prompts(path: Path, line: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": line.format(i=i, j=i * 7 % 40)}) + "\n" for i in range(40)))
    return path


def test_prompts_are_recorded_once_and_told_apart(cli: Callable, tmp_path: Path) -> None:
    code = _prompts(tmp_path / "code.jsonl", "import os\n\ndef f{i}(x):\n    return os.path.join(x, {j})\n")
    text = _prompts(tmp_path / "text.jsonl", "There were {i} of them in the {j} years that followed, and nobody asked")
    both = ["--positive", code, "--negative", text, "--hook-point", POINTS[1], "--library", tmp_path / "vectors"]
    for phase in ("prefill", "decode"):
        words = ["--phase", phase, "--new-tokens", "8", "--runs", tmp_path / phase]
        done = cli("vector", "make", "mean-difference", phase, *both, *words)
        assert done.returncode == 0, done.stderr
    done = cli("vector", "make", "probe", "code", *both, "--fpr", "0.1", "--runs", tmp_path / "prefill")
    assert done.returncode == 0, done.stderr
    library = Library.open(tmp_path / "vectors")
    library.check(width=256, layers=4, weight_hash=weight_hash_of_folder(MODEL))
    for name in ("prefill", "decode", "code"):
        evidence = library[name].card.evidence
        assert evidence["held_out_auc"]["low"] > 0.8, name
    decoded = library["decode"].card.made_by.inputs["positive"]
    assert decoded["positions"] == 40 * 7  # eight tokens, of which the last has no row
    for run in (tmp_path / "prefill" / "positive", tmp_path / "decode" / "negative"):
        assert [str(c) for c in verify(load_run(run)) if not c.holds] == []
