"""Proof that a change of the code changes no number: the same recordings, read before and after.

    python bench/same.py record FOLDER            # needs SGLang: one small study of every kind, and a telemetry run
    python bench/same.py digest FOLDER OUT.json   # with the code of this checkout: every table, row and summary
    python bench/same.py compare OLD.json NEW.json

`digest` starts no engine. It works on a copy, since studies write into their folder. It uses only what users use: the
commands, and what `load_run` gives. So it runs with older code too (`PYTHONPATH=<that checkout>`); file names that
changed since are in `RENAMED`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

DOCUMENTS = {"source": "documents", "count": 6, "chars": 900, "seed": 3}
ATTENTION = [f"blocks.{i}.attn.{h}" for i in range(4) for h in ("hook_q", "hook_rot_q", "hook_rot_k", "hook_v")]
STUDIES: dict[str, dict[str, Any]] = {
    "ab": {
        "workload": {"source": "shared_prefix", "families": 6, "requests_per_family": 3, "exemplars": 2},
        "sampling": {"max_new_tokens": 12, "temperature": 0.0},
        "hook_points": ["hook_embed", "blocks.0.hook_resid_post", "blocks.3.hook_resid_post"],
        "baseline": "cache_off",
        "concurrency": 4,
    },
    "evict": {
        "model": "probe-recall",
        "workloads": {
            "chase": {"source": "retrieval", "task": "chase", "count": 4, "prompt_tokens": 228, "answers": 4}
        },
        "budgets": ["1/8", "1/4"],
        "trivial": {"sinks": 4, "window": 8},
        "methods": [
            "random",
            "knorm",
            {"method": "snapkv", "window": 8, "pooling": "none"},
            {"method": "laq", "recent": 8},
        ],
        "oracles": ["static_mean", "need_set"],
    },
    "factorial": {
        "workload": DOCUMENTS,
        "dtype": "float32",
        "layers": [0, 1, 2, 3],
        "evict_positions": ["true", "zero"],
        "evict_steps": 8,
        "pseudo_tokens": 8,
        "decode_steps": 12,
        "concurrency": 3,
    },
    "phase": {
        "workload": DOCUMENTS,
        "prompt_tokens": 40,
        "continuation_tokens": 24,
        "hook_points": ["hook_embed", "blocks.3.hook_resid_post"],
        "concurrency": 3,
    },
    "harvest": {
        "name": "drift",
        "workload": DOCUMENTS,
        "sampling": {"max_new_tokens": 48, "temperature": 1.0, "ignore_eos": True},
        "hook_points": ["hook_embed", *ATTENTION],
        "concurrency": 3,
    },
}
TELEMETRY = {
    "name": "telemetry",
    "workload": {"source": "shared_prefix", "families": 3, "requests_per_family": 3, "exemplars": 2},
    "sampling": {"max_new_tokens": 12, "temperature": 0.0},
    "hook_points": ["hook_embed", "blocks.1.attn.hook_rot_k", "blocks.2.hook_resid_post"],
    "rows": {"window": 16, "decode": {"every": 2}},
    "telemetry": {"every": 2, "top_k": 4},
    "concurrency": 3,
}
RENAMED = {"phase.json": "summary.json", "lossless.json": "summary.json", "coverage.json": "summary.json"}
"""Summaries that had a name of their own before every study wrote `summary.json`."""


def record(folder: Path) -> None:
    """Record every study once."""
    folder.mkdir(parents=True, exist_ok=True)
    for command, fields in STUDIES.items():
        name = fields.get("name", command)
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**fields, "name": name, "output": str(folder.resolve())}))
        if not (folder / name).exists():
            run_command(command, file)
    file = folder / "telemetry.yaml"
    file.write_text(yaml.safe_dump({**TELEMETRY, "output": str(folder.resolve())}))
    if not (folder / "telemetry").exists():
        run_command("harvest", file)


def digest(folder: Path) -> dict[str, str]:
    """Name of every number that is read, and the SHA-256 of it."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        shutil.copytree(folder, copy)
        for manifest in sorted(copy.rglob("manifest.json")):
            found |= {f"run {manifest.parent.relative_to(copy)}: {k}": v for k, v in of_run(manifest.parent).items()}
        for command in ("ab", "evict", "factorial", "phase"):
            for old in [*(copy / command).glob("*.json"), *(copy / command / "tables").glob("*")]:
                if old.name not in ("experiment.json", "stages.json", "evicted.json"):
                    old.unlink()
            run_command(command, copy / f"{command}.yaml", "--report-only", "--output", copy / command)
            found |= of_summary(command, copy / command)
        for command, of, out in (("query-drift", "drift", "query-drift"), ("coverage", "ab/cache_on", "coverage")):
            run_command(command, copy / of, "--output", copy / out)
            found |= of_summary(command, copy / out)
    return found


def of_run(path: Path) -> dict[str, str]:
    """Everything that a run directory gives."""
    import numpy as np

    import sglang_probe

    run = sglang_probe.load_run(path)
    frames = {
        name: getattr(run, name) for name in ("spans", "forwards", "requests", "engine_requests", "rebinds", "tokens")
    }
    if run.manifest.get("telemetry"):
        frames["telemetry"] = run.telemetry
    found = {name: text_digest(read().to_json(orient="split", double_precision=15)) for name, read in frames.items()}
    for hook_point in run.hook_points:
        total = hashlib.sha256()
        for numbers, rows in run.iter_shards(hook_point):
            total.update(np.ascontiguousarray(numbers).tobytes())
            total.update(rows.float().numpy().tobytes())
        found[f"rows of {hook_point}"] = total.hexdigest()
        rid = run.requests()["rid"].iloc[-1]
        gathered = run.activations(rid, hook_point, missing="nan")
        found[f"activations of {hook_point}"] = hashlib.sha256(gathered.float().numpy().tobytes()).hexdigest()
        total = hashlib.sha256()
        for batch in run.iter_batches(hook_point, batch_size=64, weight="traffic", seed=1):
            total.update(batch.float().numpy().tobytes())
        found[f"batches of {hook_point}"] = total.hexdigest()
    checked = subprocess.run(
        [sys.executable, "-m", "sglang_probe", "verify", str(path), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    checks = json.loads(checked.stdout)["checks"]
    found["verify"] = json.dumps([[c["name"], c["covered"], c["violation"]] for c in checks])
    return found


def of_summary(command: str, folder: Path) -> dict[str, str]:
    """Leaves of a study's summary, and its tables."""
    import pandas as pd

    found = {}
    for file in sorted(folder.glob("*.json")):
        if file.name in ("experiment.json", "stages.json", "evicted.json", "manifest.json"):
            continue
        for key, value in leaves(json.loads(file.read_text())):
            found[f"{command} {RENAMED.get(file.name, file.name)}: {key}"] = repr(value)
    for file in sorted([*folder.glob("*.parquet"), *folder.glob("tables/*.parquet")]):
        if file.name.endswith((".asked.parquet", ".cells.parquet")):
            continue
        table = pd.read_parquet(file).to_json(orient="split", double_precision=15)
        found[f"{command} table {file.stem}"] = text_digest(table)
    assert found, f"{folder} has no summary"
    return found


def leaves(value: Any, at: str = "") -> list[tuple[str, Any]]:
    """Every scalar of nested JSON with its path."""
    if isinstance(value, dict):
        return [x for k, v in value.items() for x in leaves(v, f"{at}.{k}")]
    if isinstance(value, list):
        return [x for i, v in enumerate(value) for x in leaves(v, f"{at}[{i}]")]
    return [(at, value)]


def compare(old: dict[str, str], new: dict[str, str]) -> int:
    """Print what differs; the number of differences. What only the new code gives is told and is no difference."""
    differing = [k for k in old if k in new and old[k] != new[k]]
    missing = [k for k in old if k not in new]
    for k in differing[:40]:
        print(f"differs: {k}: {old[k]} -> {new[k]}")
    for k in missing[:40]:
        print(f"missing: {k}")
    added = len(new.keys() - old.keys())
    print(f"{len(old)} values: {len(differing)} differ, {len(missing)} are missing; {added} are new")
    return len(differing) + len(missing)


def run_command(*args: Any) -> None:
    """Run `sglang-probe`, with the code that this process imports."""
    done = subprocess.run(
        [sys.executable, "-m", "sglang_probe", *map(str, args)],
        env={**os.environ, "COLUMNS": "160"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(map(str, args))} failed:\n{done.stdout[-3000:]}")
    print(f"{args[0]}: exit code {done.returncode}", flush=True)


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("folder", type=Path)
    reading = commands.add_parser("digest")
    reading.add_argument("folder", type=Path)
    reading.add_argument("out", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        record(args.folder)
    elif args.command == "digest":
        args.out.write_text(json.dumps(digest(args.folder), indent=1) + "\n")
    else:
        raise SystemExit(min(1, compare(json.loads(args.old.read_text()), json.loads(args.new.read_text()))))


if __name__ == "__main__":
    main()
