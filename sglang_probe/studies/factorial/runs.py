"""The harvest of the content-by-position factorial: real decoding, another continuation, and all cells, in one engine.

A cell is N pseudo tokens behind the prompt, which comes from the prefix cache. Position is the RoPE position alone
(`sglang_probe/policy/positions.py`): every cell sees the same keys in the same order.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sglang_probe.engine.hooks import inventory
from sglang_probe.errors import ConfigError, RunDirectoryError, WorkloadError
from sglang_probe.harvest.config import Recording
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.kept_requests import EvictedRequest, run_evicted
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.progress import Reporter
from sglang_probe.harvest.recording import Hooks, harvest, manifest_of
from sglang_probe.kept_set import KeptFile, write_kept
from sglang_probe.policy.arm import Arm
from sglang_probe.run.hook_points import EMBED, QUERY, RESID_POST, ROTATED_KEY, ROTATED_QUERY, VALUE
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run
from sglang_probe.run.selection import RowsConfig
from sglang_probe.studies.ab.runs import complete_run
from sglang_probe.studies.factorial import cells
from sglang_probe.studies.factorial.evicted import BASELINE, FULL, evicted_rid
from sglang_probe.studies.factorial.kept_sets import kept_sets
from sglang_probe.studies.factorial.study import FactorialOptions
from sglang_probe.workload.build import Workload, WorkloadConfig
from sglang_probe.workload.documents import Documents
from sglang_probe.workload.request import Request, SegmentSpan

DECODED, RESAMPLED, CELLS, EVICTED = "decoded", "resampled", "cells", "evicted"
EVICTED_OPTIONS = "evicted.json"
_EVICTION_FIELDS = {"budgets", "evict_positions", "evict_steps", "window", "sinks", "pseudo_tokens"}
"""What the evicted run depends on beyond the runs before it."""

PSEUDO = "pseudo"
"""Segment of the pseudo tokens."""


class FactorialConfig(Recording):
    """A factorial study."""

    name: str | None = None
    workload: WorkloadConfig = Field(default_factory=Documents)
    layers: list[int] = Field(min_length=1)
    """Layers whose queries, keys and values are captured."""
    pseudo_tokens: int = Field(default=32, ge=2)
    """N: pseudo tokens of a cell, and decode steps that their queries are compared with."""
    decode_steps: int = Field(default=64, ge=2)
    """Steps of the real decoding, whose attention is the truth that the cells should predict."""
    sampling: dict[str, Any] = Field(default_factory=lambda: {"temperature": 0.0})
    """Of the real decoding."""
    resampling: dict[str, Any] = Field(default_factory=lambda: {"temperature": 1.0})
    """Of the other continuation."""
    first_tokens: int = Field(default=4, ge=0)
    """Of content `prompt`: so many of the prompt's first tokens, the rest from its end."""
    filler: str = "Sorry, I do not know the answer to that. "
    window: int = Field(default=8, ge=1)
    """Last prompt positions that every kept set holds and that no measure counts."""
    sinks: int = Field(default=4, ge=0)
    """First prompt positions, likewise."""
    budgets: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=lambda: [0.125, 0.25], min_length=1)
    """Kept shares of the prompt. The first is that of the evictions."""
    evict_positions: list[Literal["true", "+8", "+32", "zero"]] = Field(default_factory=list)
    """Decode once more after evicting by the cells of these positions; empty: no eviction. Needs all `layers`."""
    evict_steps: int = Field(default=32, ge=2)
    """Tokens of the real decoding that are forced there."""

    @field_validator("evict_positions", mode="before")
    @classmethod
    def _yaml_reads_true_as_a_boolean(cls, values: Any) -> Any:
        return ["true" if v is True else v for v in values] if isinstance(values, list) else values

    @model_validator(mode="before")
    @classmethod
    def _points_of_layers(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("layers"), list):
            return data
        if "hook_points" in data:
            raise ValueError("`layers` says what is captured; leave `hook_points` out")
        sites = (QUERY, ROTATED_QUERY, ROTATED_KEY, VALUE)
        return {**data, "hook_points": [EMBED, *(f"blocks.{i}.{s}" for i in data["layers"] for s in sites)]}

    @model_validator(mode="after")
    def _steps_cover_the_pseudo_tokens(self) -> FactorialConfig:
        if self.decode_steps < self.pseudo_tokens:
            raise ValueError("`decode_steps` must be at least `pseudo_tokens`, whose queries they are compared with")
        return self

    @model_validator(mode="after")
    def _can_be_read(self) -> FactorialConfig:
        if self.rows != RowsConfig():
            raise ValueError("this study reads all positions and heads of its layers: leave `rows` out")
        if self.telemetry is not None and self.evict_positions:
            raise ValueError("evictions cannot be served with `telemetry`: leave it or `evict_positions` out")
        return self


def runs_in(folder: Path) -> dict[str, Run]:
    """The runs of a study that was harvested."""
    names = (DECODED, RESAMPLED, CELLS, EVICTED)
    return {name: load_run(folder / name) for name in names if name != EVICTED or (folder / name).exists()}


def options_of(config: FactorialConfig) -> FactorialOptions:
    """What the study must know of the harvest."""
    return FactorialOptions(config.pseudo_tokens, config.window, config.sinks, tuple(config.budgets))


def run_factorial(
    prepared: Prepared,
    config: FactorialConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Run]:
    """Harvest all runs in one engine, and evictions in another. With `resume`, complete runs are kept.

    Raises:
        WorkloadError: a prompt is shorter than what is kept of it in any case.
        ConfigError: an eviction was asked and not all layers are captured.
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked.
        InventoryError: the installed SGLang was not reviewed for what the study asks.
        ProbeError: a recording failed.
    """
    inventory.require(["bypass", "positions", *(["eviction"] if config.evict_positions else [])])
    shortest = config.window + config.sinks + config.pseudo_tokens
    prompts = [r for r in prepared.workload.requests if len(r.prompt_ids) > shortest]
    if len(prompts) < 2:
        raise WorkloadError(f"{len(prompts)} prompts have more than {shortest} tokens", fix="longer prompts")
    if config.evict_positions and sorted(config.layers) != list(range(prepared.model.layers)):
        raise ConfigError(
            f"an eviction keeps positions in all {prepared.model.layers} layers; `layers` names {config.layers}",
            fix="capture all layers, or leave `evict_positions` out",
        )
    if overwrite and (folder / EVICTED / MANIFEST).exists():
        shutil.rmtree(folder / EVICTED)  # a resumption would take it for that of the new runs
    runs: dict[str, Run] = {}
    with EngineHost() as host:
        for name in (DECODED, RESAMPLED, CELLS):
            requests = _requests(name, prompts, prepared, config, runs)
            ours = copy.copy(prepared)
            ours.workload = Workload(requests, 0, prepared.workload.corpus_digest)
            path = folder / name
            run = complete_run(path, manifest_of(ours, path, Arm(), name, None, None)) if resume else None
            if run is None:
                run = harvest(
                    ours,
                    path,
                    Arm(),
                    arm_name=name,
                    overwrite=overwrite,
                    resume=resume and path.exists(),
                    reporter=reporter,
                    host=host,
                    hooks=Hooks(positions=True),
                )
            runs[name] = run
    if config.evict_positions:
        runs[EVICTED] = _evicted(prepared, config, folder, runs, overwrite=overwrite, resume=resume, reporter=reporter)
    return runs


def _evicted(
    prepared: Prepared,
    config: FactorialConfig,
    folder: Path,
    runs: dict[str, Run],
    *,
    overwrite: bool,
    resume: bool,
    reporter: Reporter | None,
) -> Run:
    """The run under evictions; with `resume` that of before, if it is complete and had the same options.

    Raises:
        RunDirectoryError: it is complete and had others.
    """
    path, file = folder / EVICTED, folder / EVICTED_OPTIONS
    wanted = _options_text(config)
    if resume and (path / MANIFEST).exists() and (there := load_run(path)).complete:
        if file.exists() and file.read_text(encoding="utf-8") != wanted:
            raise RunDirectoryError(
                f"{path} was recorded with other options of the eviction", fix=f"delete {path}, or use --overwrite"
            )
        return there
    file.write_text(wanted, encoding="utf-8")
    return _evict(prepared, config, folder, runs, overwrite=overwrite or resume, reporter=reporter)


def _options_text(config: FactorialConfig) -> str:
    return json.dumps(config.model_dump(mode="json", include=_EVICTION_FIELDS), sort_keys=True)


def _evict(
    prepared: Prepared,
    config: FactorialConfig,
    folder: Path,
    runs: dict[str, Run],
    *,
    overwrite: bool,
    reporter: Reporter | None,
) -> Run:
    """Decode the true continuation from the cache that each cell would keep, and capture what predicts it."""
    path = folder / "kept.safetensors"
    write_kept(path, kept_sets(runs, options_of(config), config.evict_positions))
    kept = KeptFile(path)
    ours = copy.copy(prepared)
    last = f"blocks.{prepared.model.layers - 1}.{RESID_POST}"
    ours.config = config.model_copy(update={"hook_points": [EMBED, last]})
    requests = runs[DECODED].requests()
    decoded = {
        r.rid: (r.prompt_ids.tolist(), r.output_ids[: config.evict_steps].tolist()) for r in requests.itertuples()
    }
    one = {"max_new_tokens": 1, "ignore_eos": True}
    asked = [EvictedRequest(rid, prompt, sampling=one) for rid, (prompt, _) in decoded.items()]
    asked += [
        EvictedRequest(evicted_rid(rid, BASELINE, FULL), prompt, force=output, publishes=False)
        for rid, (prompt, output) in decoded.items()
    ]
    for key in kept:
        prompt, output = decoded[key.split(".")[0]]
        asked.append(EvictedRequest(key, prompt, key=key, force=output))
    return run_evicted(ours, folder / EVICTED, asked, kept=kept, overwrite=overwrite, reporter=reporter)


def _requests(
    name: str, prompts: list[Request], prepared: Prepared, config: FactorialConfig, runs: dict[str, Run]
) -> list[Request]:
    if name != CELLS:
        sampling = config.sampling if name == DECODED else config.resampling
        # The last sampled token never runs through the model.
        params = {**sampling, "max_new_tokens": config.decode_steps + 1, "ignore_eos": True}
        return [replace(r, sampling_params=params) for r in prompts]
    outputs = {
        kind: dict(zip(run.requests()["index"], run.requests()["output_ids"], strict=True))
        for kind, run in runs.items()
    }
    tokenizer = prepared.model.tokenizer
    filler = tokenizer.encode(config.filler, add_special_tokens=False)
    vocabulary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    n = config.pseudo_tokens
    contents = [
        {
            cells.REAL: outputs[DECODED][r.index][:n],
            cells.RESAMPLED: outputs[RESAMPLED][r.index][:n],
            cells.PROMPT: cells.prompt_ends(r.prompt_ids, n, config.first_tokens),
            cells.FILLER: cells.repeated(filler, n),
            cells.RANDOM: cells.random_tokens(vocabulary, n, r.rid),
        }
        for r in prompts
    ]
    params = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
    # The prompts alone come first and fill the cache; a cell publishes nothing.
    requests = [replace(r, index=i, sampling_params=params) for i, r in enumerate(prompts)]
    for cell in cells.all_cells():
        for r, content in zip(prompts, contents, strict=True):
            length = len(r.prompt_ids)
            positions = {"from": length, "to": cell.start(length)}
            requests.append(
                replace(
                    r,
                    index=len(requests),
                    rid=cell.rid(r.rid),
                    prompt_ids=(*r.prompt_ids, *map(int, content[cell.content])),
                    spans=(*r.spans, SegmentSpan(PSEUDO, length, length + n)),
                    sampling_params={**params, "custom_params": {"probe": {"positions": positions}}},
                    labels=(),
                )
            )
    return requests
