"""Two sets of prompts as runs: recorded runs as they are, and files of prompts recorded by one engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.config import beside
from sglang_probe.errors import ConfigError
from sglang_probe.harvest.api import Experiment
from sglang_probe.harvest.progress import Reporter
from sglang_probe.run.hook_points import EMBED
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run
from sglang_probe.yaml_text import read_yaml


@dataclass(frozen=True)
class Recorder:
    """How prompts that are given as files are recorded."""

    folder: Path
    """Gets a run directory for each set; a repeated command keeps what is there."""
    hook_point: str
    model: str
    new_tokens: int = 1
    """Tokens that are generated for each prompt."""
    dtype: str = "auto"
    reporter: Reporter | None = None


def runs_of(sets: Mapping[str, Path], recorder: Recorder) -> dict[str, Run]:
    """Every set as a run: a run directory is opened; a JSONL file or a YAML with a workload is recorded.

    Raises:
        ConfigError: a path is none of these.
        ProbeError: a prompt cannot be served, or the recording failed.
    """
    workloads = {name: workload for name, path in sets.items() if (workload := workload_of(path)) is not None}
    runs = {name: load_run(path) for name, path in sets.items() if name not in workloads}
    if workloads:
        experiments = {name: _experiment(workload, recorder) for name, workload in workloads.items()}
        with next(iter(experiments.values())) as first:  # one engine for all: the others bring their requests
            for name, experiment in experiments.items():
                runs[name] = first.record(recorder.folder / name, requests=experiment.requests, resume=True)
    return runs


def workload_of(path: Path) -> dict[str, Any] | None:
    """The workload that a file means; None: the path is a run directory.

    Raises:
        ConfigError: it is neither.
    """
    if (path / MANIFEST).exists():
        return None
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        told = read_yaml(path)
        told = told.get("workload", told)
        if not isinstance(told, dict) or "source" not in told:
            raise ConfigError(f"{path}: there is no workload in it", fix="give `workload: {source: jsonl, path: ...}`")
        return {**told, "path": beside(str(told["path"]), path.parent)} if "path" in told else told
    if path.is_file():
        return {"source": "jsonl", "path": str(path)}
    raise ConfigError(
        f"{path} is no set of prompts",
        fix='give a run directory, a JSONL file of {"prompt": "..."} or {"messages": [...]}, or a YAML with `workload`',
    )


def _experiment(workload: dict[str, Any], recorder: Recorder) -> Experiment:
    return Experiment(
        model=recorder.model,
        workload=workload,
        hook_points=[EMBED, recorder.hook_point],
        reporter=recorder.reporter,
        dtype=recorder.dtype,
        sampling={"max_new_tokens": recorder.new_tokens, "temperature": 0.0, "ignore_eos": True},
    )
