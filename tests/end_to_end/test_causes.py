"""Causes on a real engine: planted ones are named, and a replay of the tree gives what the engine gave."""

from __future__ import annotations

import random

import pytest

from sglang_probe.harvest.api import Experiment
from sglang_probe.run.run import Run
from sglang_probe.studies.what_if.study import what_if
from sglang_probe.studies.why.study import why
from sglang_probe.verify.verify import verify

pytestmark = [pytest.mark.engine, pytest.mark.slow]

RULES = (
    "Answer in short sentences. Name the file and the line. Do not guess. If a test fails, say which one and why. "
    "Never write to the network. Prefer the standard library."
)
TOOLS = [
    '{"name": "read_file", "description": "Read one file of the project and return its text with line numbers"}',
    '{"name": "run_tests", "description": "Run the tests of one module and return what failed, with the traceback"}',
    '{"name": "search", "description": "Search all files for a word and return the lines that have it"}',
]
ASKED = ("why is the sky blue", "list the modules", "what does main do", "open the log")


def stamped(i: int) -> str:
    return f"You are a coding agent. Current time: 2026-11-27 10:{17 + i}:05. {RULES} Question: {ASKED[i]}"


def shuffled(i: int) -> str:
    tools = TOOLS[i:] + TOOLS[:i]
    return f"Tools: {' '.join(tools)} Task {i}: do it now"


def filler(i: int) -> str:
    rng = random.Random(100 + i)
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(60))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    prompts = [*map(stamped, range(4)), *map(shuffled, range(3)), *map(filler, range(12)), filler(0)]
    server = {"page_size": 1, "max_total_tokens": 2048}
    sampling = {"max_new_tokens": 4}
    with Experiment(model="probe-text", prompts=prompts, server=server, concurrency=1, sampling=sampling) as experiment:
        return experiment.record(tmp_path_factory.mktemp("causes") / "run")


def test_the_sums_hold(run: Run) -> None:
    checks = {c.name: c for c in verify(run)}
    assert [str(c) for c in checks.values() if not c.holds] == []
    assert checks["causes"].covered == run.forwards()["prefill_tokens"].sum()


def test_planted_causes_are_named(run: Run) -> None:
    saved = {r.what: int(r.tokens) for r in why(run.path).remedies.itertuples()}
    assert saved["diverged: a time or an identifier"] > 100
    assert saved["diverged: another order"] > 100
    assert saved["evicted"] > 100


def test_the_tree_replayed_gives_what_the_engine_gave_to_the_token(run: Run) -> None:
    result = what_if(run.path, kv_tokens="4x")
    assert result.differ == 0
    assert result.table["difference"].tolist()[1] > 100
