"""Proof by attack: random traffic on a real engine, the invariants, and the true owner of every KV slot.

Each safeguard has a negative control: with it disabled, something must notice. Seeds are printed by the driver and can
be replayed: `python -m tests.attack.driver --seed N --out DIR` (`PYTHONPATH` as below for the slot oracle).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.ledger.run import load_run
from sglang_probe.ledger.verify import verify

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parent.parent.parent


@dataclass
class Outcome:
    """What an attack left behind."""

    oracle: dict[str, Any]
    violations: dict[str, str]
    counts: dict[str, Any]
    output: str


def attack(path: Path, seed: int, requests: int, *, sabotage: str = "", **server: Any) -> Outcome:
    """Run the driver under the slot oracle, in processes of its own."""
    report = path / "oracle.json"
    command = [sys.executable, "-m", "tests.attack.driver", "--seed", str(seed), "--requests", str(requests)]
    command += ["--out", str(path / "run"), "--server", json.dumps(server)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/attack/plugin")]),
        "SLOT_ORACLE": str(report),
        "SLOT_ORACLE_SABOTAGE": sabotage,
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=900)
    output = done.stdout + done.stderr
    counts = [line.removeprefix("DONE ") for line in done.stdout.splitlines() if line.startswith("DONE ")]
    if not sabotage:
        assert counts, output
    run = load_run(path / "run")
    violations = {c.name: str(c.violation) for c in verify(run) if not c.holds}
    if run.manifest.get("fault"):
        violations["fault"] = run.manifest["fault"]
    # A recording that stopped at once leaves no report; an attack that compared nothing never counts as exact.
    silent = {"compared": 0, "wrong": 0, "unknown": 0, "first": None}
    oracle = json.loads(report.read_text()) if report.exists() else silent
    return Outcome(oracle, violations, json.loads(counts[-1]) if counts else {}, output)


def assert_exact(outcome: Outcome) -> None:
    assert outcome.violations == {}, outcome.output
    assert outcome.oracle["compared"] > 20_000
    assert (outcome.oracle["wrong"], outcome.oracle["unknown"]) == (0, 0), (outcome.oracle["first"], outcome.output)


@pytest.mark.parametrize("seed", [2, 3])
def test_random_traffic_keeps_every_invariant_and_every_owner(seed: int, tmp_path: Path) -> None:
    outcome = attack(tmp_path, seed, 100)
    assert_exact(outcome)
    assert outcome.counts["reused"] > 1000
    assert outcome.counts["rebinds"] > 0
    # Seed 2: mixed chunks, LFU, 1,024 tokens of KV. Seed 3: retraction.
    assert outcome.counts["mixed" if seed == 2 else "retracted"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 22))
def test_long_attack(seed: int, tmp_path: Path) -> None:
    assert_exact(attack(tmp_path, seed, 400))


@pytest.mark.parametrize(
    ("sabotage", "seed", "server"),
    [
        ("ignore rebinds", 2, {}),
        pytest.param("ignore publications", 2, {}, marks=pytest.mark.slow),
        pytest.param("token keys in pages", 2, {"page_size": 16, "max_total_tokens": 4096}, marks=pytest.mark.slow),
        pytest.param("keep the first owner", 2, {"max_total_tokens": 1024}, marks=pytest.mark.slow),
        pytest.param("no attempts", 3, {}, marks=pytest.mark.slow),
        pytest.param("shift the rows", 2, {}, marks=pytest.mark.slow),
    ],
)
def test_without_a_safeguard_the_attack_is_noticed(sabotage: str, seed: int, server: dict, tmp_path: Path) -> None:
    outcome = attack(tmp_path, seed, 80, sabotage=sabotage, **server)
    noticed = outcome.oracle["wrong"] + outcome.oracle["unknown"] > 0 or outcome.violations
    assert noticed, outcome.output
