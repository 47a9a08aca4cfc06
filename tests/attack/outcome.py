"""One attack in processes of its own, under the slot oracle, and everything that could have noticed a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify
from tests.attack.written import compare

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Outcome:
    """What an attack left behind."""

    oracle: dict[str, Any]
    """Counts of the slot oracle, of all ranks together."""
    violations: dict[str, str]
    """Invariants that do not hold, by name; `ends` if a request has none, `fault` if the probe stopped
    itself, `driver` if the attack did not end."""
    counts: dict[str, Any]
    """What the driver counted."""
    options: dict[str, Any]
    output: str
    refused: str | None = None
    """Why the probe refused the configuration; nothing was run then."""

    @property
    def noticed(self) -> list[str]:
        """What is wrong, in words."""
        found = [f"{name}: {text}" for name, text in self.violations.items()]
        if self.oracle["wrong"] or self.oracle["unknown"]:
            found.append(
                f"slots: {self.oracle['wrong']} wrong, {self.oracle['unknown']} unknown; {self.oracle['first']}"
            )
        return found


def attack(path: Path, seed: int, requests: int, *, sabotage: str = "", plan: dict[str, Any] | None = None) -> Outcome:
    """Run the driver.

    Args:
        path: an empty folder; the run is left in `path/run`.
        sabotage: a safeguard to disable (`tests/attack/plugin/slot_sabotage.py`).
        plan: fields of `Plan`, over the drawn ones.
    """
    command = [sys.executable, "-m", "tests.attack.driver", "--seed", str(seed), "--requests", str(requests)]
    command += ["--out", str(path / "run"), "--plan", json.dumps(plan or {})]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/attack/plugin")]),
        "SLOT_ORACLE": str(path / "oracle"),
        "SLOT_ORACLE_SABOTAGE": sabotage,
    }
    violations, output, written = {}, "", 0
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600)
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as e:
        output = "".join(x.decode() if isinstance(x, bytes) else x for x in (e.stdout or "", e.stderr or ""))
        violations["driver"] = "did not end within 600 s"
    said = {
        name: json.loads(rest)
        for name, _, rest in (line.partition(" ") for line in output.splitlines())
        if name in ("ATTACK", "DONE", "REFUSED")
    }
    refused = said.get("REFUSED")
    due = said.get("ATTACK", {}).get("refused")
    if (refused is None) != (due is None) or (refused and due not in refused):
        violations["refusal"] = f"`{due}` must be refused by name, and what was said is: {refused}"
    if "DONE" not in said and refused is None:
        violations.setdefault("driver", output[-2000:])
    if (path / "run" / "manifest.json").exists():
        run = load_run(path / "run")
        violations |= {c.name: str(c.violation) for c in verify(run) if not c.holds}
        written, wrong = compare(run, path.glob("oracle.*.truth"))
        if wrong is not None:
            violations["written"] = wrong
        ended = {rid.partition("~")[0] for rid in run.engine_requests()["rid"]}
        if endless := sorted({f"r{i:06d}" for i in range(requests)} - ended):
            violations["ends"] = f"{len(endless)} of {requests} requests never ended, the first {endless[0]}"
        if run.manifest.get("fault"):
            violations["fault"] = run.manifest["fault"]
    options = said.get("ATTACK", {}).get("options", {})
    return Outcome(_oracle(path) | {"written": written}, violations, said.get("DONE", {}), options, output, refused)


def _oracle(path: Path) -> dict[str, Any]:
    """The reports of all ranks, summed. A recording that stopped at once leaves none: nothing was compared then."""
    total: dict[str, Any] = {"compared": 0, "wrong": 0, "unknown": 0, "forwards": 0, "first": None}
    for report in path.glob("oracle.*.json"):
        for name, value in json.loads(report.read_text()).items():
            total[name] = (total[name] or value) if name == "first" else total[name] + value
    return total
