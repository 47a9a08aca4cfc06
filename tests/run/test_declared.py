"""Commands that read runs need what `pyproject.toml` declares, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from sglang_probe.run.manifest import MANIFEST, new_manifest
from sglang_probe.run.run import Run
from tests.declared import run_commands


def test_commands_read_runs_where_nothing_else_is_installed(make_run: Callable[..., Run], tmp_path: Path) -> None:
    """On made-up runs. tests/end_to_end has the studies whose runs only an engine can make."""
    arms = {"cache_on": {}, "cache_off": {"cache": "off"}}
    for name in [arm + again for arm in arms for again in ("", ".repeat")]:
        run = make_run(name, cache=name.startswith("cache_on"))
        timing = [{"seconds": 1.0, "requests": 2}]
        told = new_manifest(
            **{**run.manifest, "name": name, "sessions": timing, "starts": timing, "concurrency": 2},
            model={"name": "made-up", "architecture": "none", "layers": 1},
            model_path="nowhere",
            rows_dtype="bfloat16",
            workload={"source": "jsonl"},
            workload_digest="0" * 64,
            lines_skipped=0,
        )
        (run.path / MANIFEST).write_text(json.dumps(told))
    config = tmp_path / "made.yaml"
    workload = {"source": "shared_prefix", "families": 1, "requests_per_family": 2}
    config.write_text(yaml.safe_dump({"workload": workload, "arms": arms}))
    one, folder = str(tmp_path / "cache_on"), str(tmp_path)
    commands = [
        ["verify", one],
        ["coverage", one],
        ["ab", str(config), "--report-only", "--output", folder],
        ["lossless", str(config), "--output", folder],
        ["verify", one, "--transformers", "1"],
    ]
    exits = run_commands(commands)
    *read, compared = [exits[" ".join(c)] for c in commands]
    assert [e or 0 for e in read] == [0] * len(read)
    assert compared == 2  # refused in a sentence
