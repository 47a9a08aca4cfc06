"""`sglang-probe prove` on the reference platform, and what it says with a safeguard taken away."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.paths import cache_dir

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]


def prove(cli: Callable, folder: Path, sabotage: str = "", *more: str) -> tuple[int, dict[str, Any]]:
    """Exit code and certificate."""
    plugin = os.pathsep.join([str(ROOT), str(ROOT / "tests/attack/plugin")])
    env = {"PYTHONPATH": plugin, "PROBE_SABOTAGE": sabotage, "SGLANG_PROBE_CACHE": str(folder / "cache")}
    # A cache of its own would have every module of SGLang compiled anew.
    env.setdefault("PYTHONPYCACHEPREFIX", os.environ.get("PYTHONPYCACHEPREFIX") or str(cache_dir() / "pycache"))
    asked = ("--requests", "24", "--rounds", "1", "--transformers", "3", "--dtype", "float32", *more)
    done = cli("prove", "--output", folder / "certificate.json", *asked, **env)
    assert (folder / "certificate.json").exists(), done.stdout + done.stderr
    return done.returncode, json.loads((folder / "certificate.json").read_text())


def violated(certificate: dict[str, Any]) -> dict[str, str]:
    return {c["name"]: c["violation"] for c in certificate["checks"] if c["violation"]}


def test_the_reference_platform_is_proved(cli: Callable, tmp_path: Path) -> None:
    code, made = prove(cli, tmp_path)
    assert violated(made) == {}
    assert (code, made["passed"]) == (0, True)
    assert {c["level"] for c in made["checks"]} == {"P2", "P3", "P4"}
    covered = {c["name"]: c["covered"] for c in made["checks"]}
    assert covered["owners, as configured"] > 1000
    assert covered["owners, small chunks"] > 1000
    assert covered["reference"] > 100
    assert made["overhead"]["ratio"] > 0
    assert made["subject"]["device"] == "cpu"
    assert set(made["subject"]["weights_sha256"]) == {"model.safetensors"}
    kept = list((tmp_path / "cache/certificates").glob("*.json"))
    assert [json.loads(p.read_text())["sha256"] for p in kept] == [made["sha256"]]


@pytest.mark.slow
@pytest.mark.reviewed("eviction")
def test_kept_sets_are_proved_where_it_is_asked(cli: Callable, tmp_path: Path) -> None:
    code, made = prove(cli, tmp_path, "", "--kept-sets")
    assert (code, violated(made)) == (0, {})
    assert "kept sets" in made["kinds"]
    found = {c["name"]: c for c in made["checks"] if c["name"].startswith("kept sets")}
    assert set(found) == {"kept sets, everything", "kept sets, half"}
    assert "equal tokens in 4 of 4 requests" in found["kept sets, everything"]["note"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "name", "said"),
    [
        ("exchange two owners", "written owners", "is only true or only written"),
        ("shift the rows", "invariants", "content"),
        ("give a row of the step before", "reference", "relative error"),
        ("leave out a tap", "recording", "hook_resid_post"),
    ],
)
def test_without_a_safeguard_the_proof_fails_and_says_what(
    sabotage: str, name: str, said: str, cli: Callable, tmp_path: Path
) -> None:
    code, made = prove(cli, tmp_path, sabotage)
    assert (code, made["passed"]) == (1, False)
    wrong = violated(made)
    assert any(check.startswith(name) and said in text for check, text in wrong.items()), wrong
