"""The runs of the content-by-position factorial: real decoding, another continuation, all cells, and evictions.

A cell is N pseudo tokens after the prompt, which comes from the prefix cache. Position is the RoPE position alone
(`sglang_probe.ask.PositionOverride`): every cell sees the same keys in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sglang_probe.ask import Ask, PositionOverride
from sglang_probe.errors import ConfigError, ProbeError, WorkloadError
from sglang_probe.harvest import kept_requests
from sglang_probe.harvest.experiment import Runs, RunSpec, record
from sglang_probe.harvest.kept_requests import KeptRequest
from sglang_probe.harvest.prepare import Prepared, check_requests, require_asks
from sglang_probe.harvest.prepare import prepare as check
from sglang_probe.harvest.progress import Reporter
from sglang_probe.kept_set import write_kept
from sglang_probe.run.hook_points import EMBED, RESID_POST
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.factorial import cells
from sglang_probe.studies.factorial.config import FactorialConfig
from sglang_probe.studies.factorial.evicted import BASELINE, FULL, evicted_rid
from sglang_probe.studies.factorial.kept_sets import kept_sets
from sglang_probe.workload.request import Request, SegmentSpan, asked_rid

__all__ = ["prepare", "read", "run"]

DECODED, RESAMPLED, CELLS, EVICTED = "decoded", "resampled", "cells", "evicted"
PSEUDO = "pseudo"
"""Segment of the pseudo tokens."""


def prepare(config: FactorialConfig) -> Prepared:
    """Check model, prompts and what the study asks of the engine; starts none.

    Raises:
        WorkloadError: a prompt is shorter than what is kept of it in any case.
        ConfigError: an eviction was asked and not all layers are captured.
        InventoryError: the installed SGLang was not reviewed for what the study asks.
        ProbeError: as `sglang_probe.harvest.prepare.prepare`.
    """
    require_asks({"positions", *(["evict"] if config.evict_positions else [])})
    prepared = check(config)
    try:
        prepared.sampling(config.resampling)
    except ProbeError as e:
        raise e.at("`resampling`") from e
    prompts = _prompts(prepared, config)
    decoded = _requests(DECODED, prompts, prepared, config, {})
    cells = _cells(prompts, config, _placeholders(prompts, config))
    check_requests(decoded, prepared)
    check_requests(cells, prepared)
    if not prepared.model.tokenizer.encode(config.filler, add_special_tokens=False):
        raise ConfigError("`filler` has no tokens", fix="give a sentence")
    if config.evict_positions and sorted(config.layers) != list(range(prepared.model.layers)):
        raise ConfigError(
            f"an eviction keeps positions in all {prepared.model.layers} layers; `layers` names {config.layers}",
            fix="capture all layers, or leave `evict_positions` out",
        )
    # All runs share an engine, and the cells are the largest of them.
    pool = replace(prepared.pool, least=prepared.pool.tokens([*decoded, *cells]))
    return replace(prepared, pool=pool)


def run(
    prepared: Prepared,
    config: FactorialConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Run]:
    """Record all runs in one engine, and evictions in another; by name. `resume`: as
    `sglang_probe.harvest.experiment.record`.

    Raises:
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked; or it is of something else.
        ProbeError: a recording failed.
    """
    prompts = _prompts(prepared, config)
    names = (DECODED, RESAMPLED, CELLS)
    specs = [RunSpec(name, partial(_requests, name, prompts, prepared, config)) for name in names]
    runs = record(specs, prepared, folder, asks={"positions"}, overwrite=overwrite, resume=resume, reporter=reporter)
    if config.evict_positions:
        file = folder / "kept.safetensors"
        sets = kept_sets(runs, config.options, config.evict_positions)
        write_kept(file, sets)
        last = f"blocks.{prepared.model.layers - 1}.{RESID_POST}"
        spec = RunSpec(EVICTED, _evicted(config, runs, sets), hook_points=[EMBED, last], kept=file)
        asks = kept_requests.ASKS
        runs |= record([spec], prepared, folder, asks=asks, overwrite=overwrite, resume=resume, reporter=reporter)
    return runs


def read(config: FactorialConfig, folder: Path) -> dict[str, Run]:
    """The runs that are in `folder`, by name; the evictions if they were recorded.

    Raises:
        RunDirectoryError: one is missing.
    """
    names = [DECODED, RESAMPLED, CELLS, *([EVICTED] if (folder / EVICTED).exists() else [])]
    return {name: load_run(folder / name) for name in names}


def _prompts(prepared: Prepared, config: FactorialConfig) -> list[Request]:
    """Requests whose prompt leaves something to choose from."""
    shortest = config.window + config.sinks + config.pseudo_tokens
    prompts = [r for r in prepared.workload.requests if len(r.prompt_ids) > shortest]
    if len(prompts) < 2:
        raise WorkloadError(f"{len(prompts)} prompts have more than {shortest} tokens", fix="longer prompts")
    return prompts


def _evicted(config: FactorialConfig, runs: Runs, keys: Iterable[str]) -> tuple[Request, ...]:
    """The true continuation, decoded from the cache that each cell would keep."""
    decoded = {
        asked_rid(r.rid): (r.prompt_ids.tolist(), r.output_ids[: config.evict_steps].tolist())
        for r in runs[DECODED].requests().itertuples()
    }
    one = {"max_new_tokens": 1, "ignore_eos": True}
    asked = [KeptRequest(rid, prompt, sampling=one) for rid, (prompt, _) in decoded.items()]
    asked += [
        KeptRequest(evicted_rid(rid, BASELINE, FULL), prompt, force=output, publishes=False)
        for rid, (prompt, output) in decoded.items()
    ]
    for key in keys:
        prompt, output = decoded[key.split(".")[0]]
        asked.append(KeptRequest(key, prompt, key=key, force=output))
    return kept_requests.requests_of(asked, config.sampling)


def _requests(
    name: str, prompts: Sequence[Request], prepared: Prepared, config: FactorialConfig, runs: Runs
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
            cells.SHIFTED: cells.later(outputs[DECODED][r.index], n),
            cells.RESAMPLED: outputs[RESAMPLED][r.index][:n],
            cells.OTHER: outputs[DECODED][prompts[(i + 1) % len(prompts)].index][:n],
            cells.PROMPT: cells.prompt_ends(r.prompt_ids, n, config.first_tokens),
            cells.FILLER: cells.repeated(filler, n),
            cells.RANDOM: cells.random_tokens(vocabulary, n, r.rid),
        }
        for i, r in enumerate(prompts)
    ]
    return _cells(prompts, config, contents)


def _placeholders(prompts: Sequence[Request], config: FactorialConfig) -> list[dict[str, Sequence[int]]]:
    """Contents as long as those of the cells will be."""
    return [dict.fromkeys(cells.CONTENTS, [r.prompt_ids[0]] * config.pseudo_tokens) for r in prompts]


def _cells(
    prompts: Sequence[Request], config: FactorialConfig, contents: Sequence[Mapping[str, Sequence[int]]]
) -> list[Request]:
    """The prompts alone, and every cell: the prompt and pseudo tokens that say what `contents` has for it."""
    n = config.pseudo_tokens
    params = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
    # The prompts alone come first and fill the cache; a cell publishes nothing.
    requests = [replace(r, index=i, sampling_params=params) for i, r in enumerate(prompts)]
    for cell in cells.all_cells():
        for r, content in zip(prompts, contents, strict=True):
            length = len(r.prompt_ids)
            positions = PositionOverride.model_validate({"from": length, "to": cell.start(length)})
            requests.append(
                replace(
                    r,
                    index=len(requests),
                    rid=cell.rid(r.rid),
                    prompt_ids=(*r.prompt_ids, *map(int, content[cell.content])),
                    spans=(*r.spans, SegmentSpan(PSEUDO, length, length + n)),
                    sampling_params=Ask(positions=positions).into(params),
                    labels=(),
                )
            )
    return requests
