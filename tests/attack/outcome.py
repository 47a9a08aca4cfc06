"""One attack in processes of its own, with the true owners of slots, and everything that could have noticed a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.prove.owners import compare, read_owners, unended
from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Outcome:
    """What an attack left behind."""

    oracle: dict[str, Any]
    """Comparisons with the true owners of slots, of all ranks together."""
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
        sabotage: a safeguard to disable (`tests/attack/plugin/sabotages.py`).
        plan: fields of `Plan`, over the drawn ones.
    """
    command = [sys.executable, "-m", "tests.attack.driver", "--seed", str(seed), "--requests", str(requests)]
    command += ["--out", str(path / "run"), "--plan", json.dumps(plan or {})]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/attack/plugin")]),
        "PROBE_SABOTAGE": sabotage,
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
    true = read_owners(path / "slots")
    if (path / "run" / "manifest.json").exists():
        run = load_run(path / "run")
        violations |= {c.name: str(c.violation) for c in verify(run) if not c.holds}
        written, wrong = compare(run, true)
        if wrong is not None:
            violations["written"] = wrong
        if endless := unended(run, (f"r{i:06d}" for i in range(requests))):
            violations["ends"] = f"{len(endless)} of {requests} requests never ended, the first {endless[0]}"
        if run.manifest.get("fault"):
            violations["fault"] = run.manifest["fault"]
    options = said.get("ATTACK", {}).get("options", {})
    compared = {name: getattr(true, name) for name in ("compared", "wrong", "unknown", "forwards", "first")}
    return Outcome(compared | {"written": written}, violations, said.get("DONE", {}), options, output, refused)
