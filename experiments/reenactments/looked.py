"""What the product says of a recorded segment, or of a server: as numbers and sentences."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from sglang_probe.run.run import load_run
from sglang_probe.studies.what_if.study import what_if
from sglang_probe.studies.why.page import answer
from sglang_probe.studies.why.study import why
from sglang_probe.verify.verify import verify


def autopsy(segment: Path) -> dict[str, Any]:
    """`sglang-probe why` and `sglang-probe verify` of a segment."""
    found, run = why(segment, by="session"), load_run(segment)
    prompt = found.computed + found.reused
    sums = sum(int(n) for n in found.causes["tokens"])
    top = found.remedies.iloc[0].to_dict() if len(found.remedies) else None
    return {
        "requests": len(run.requests()),
        "prompt": prompt,
        "computed": found.computed,
        "reused": found.reused,
        "share": found.reused / prompt,
        "causes": {r.cause: int(r.tokens) for r in found.causes.itertuples()},
        "sums_exactly": sums == found.computed,
        "violations": [f"{c.name}: {c.violation}" for c in verify(run) if not c.holds],
        "sentence": answer(found).replace("**", ""),
        "first_remedy": top,
    }


def predicted(segment: Path, **settings: Any) -> dict[str, Any]:
    """`sglang-probe what-if` of a segment: reuse as recorded, replayed, and under other settings."""
    found = what_if(segment, **settings)
    other = found.table.iloc[-1]
    return {
        "settings": other["settings"],
        "schedule": other["schedule"],
        "reused": int(other["reused"]),
        "share": float(other["share"]),
        "did_not_fit": int(other["did_not_fit"]),
        "matches": len(found.requests),
        "matches_that_differ": found.differ,
    }


def gate(server: str, folder: Path, *more: str) -> dict[str, Any]:
    """`sglang-probe gate`: its verdict and what it measured."""
    code, said = command("gate", server, "--output", str(folder), "--overwrite", "--json", *more)
    if not (folder / "summary.json").exists():
        raise RuntimeError(said)
    told = json.loads((folder / "summary.json").read_text())
    kept = ("verdict", "sentence", "yardstick_nats", "threshold_nats", "wrong_tokens_seen", "requests", "seconds")
    paths = [
        {k: p[k] for k in ("path", "cases", "effect", "floor", "yardstick", "most", "flips", "floor_flips", "equal")}
        for p in told["paths"]
    ]
    wrong: dict[str, int] = {}
    for w in told["wrong"]:
        wrong[w["path"]] = wrong.get(w["path"], 0) + 1
    origins = sorted({o for w in told["wrong"] for o in w["origin"]})
    return {
        "exit_code": code,
        **{k: told[k] for k in kept},
        "paths": paths,
        "wrong_by_path": wrong,
        "cases": told["config"]["cases"],
        "origins_named": len(origins),
    }


def audit(url: str, recorded: Path, folder: Path) -> dict[str, Any]:
    """`sglang-probe audit --once --share 1` of what a server has recorded."""
    file = folder / "audit.jsonl"
    file.unlink(missing_ok=True)
    words = ["audit", url, str(recorded), "--output", str(file), "--share", "1", "--once"]
    code, said = command(*words, "--tokens-per-minute", "10000000")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not lines:
        raise RuntimeError(said)
    found: dict[str, int] = {}
    for line in lines:
        found[line["found"]] = found.get(line["found"], 0) + 1
    wrong = [line for line in lines if line["found"] == "wrong"]
    return {
        "exit_code": code,
        "found": found,
        "origins": sorted({o for line in wrong for o in line["origins"]}),
        "moved": max((line["moved"] for line in wrong if line["moved"] is not None), default=None),
    }


def command(*words: str) -> tuple[int, str]:
    """Exit code and output of `sglang-probe WORDS`."""
    said = subprocess.run([sys.executable, "-m", "sglang_probe", *words], capture_output=True, text=True, check=False)
    return said.returncode, said.stdout + said.stderr
