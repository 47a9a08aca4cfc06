"""The harvest of an eviction study: full-cache runs with captured attention rows, then runs under kept sets."""

from __future__ import annotations

import copy
import glob
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.engine.hooks import inventory
from sglang_probe.errors import ConfigError, RunDirectoryError, WorkloadError
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.kept_requests import EvictedRequest, run_evicted
from sglang_probe.harvest.model import resolve_model
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.progress import Reporter
from sglang_probe.harvest.recording import Hooks, harvest, manifest_of
from sglang_probe.kept_set import write_kept
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.ab.runs import complete_run
from sglang_probe.studies.evict.config import Cut, Decode, EvictionConfig
from sglang_probe.studies.evict.lookahead_runs import DAPQ, Asked
from sglang_probe.studies.evict.study import EXCLUDED_FILE, HEADS_FILE, OFFLINE_FILE
from sglang_probe.workload.build import Workload
from sglang_probe.workload.request import Request, SegmentSpan, Truth

FULL, REFERENCE = "full", "reference"
EXPERIMENT_FILE = "experiment.json"


def prepare(config: EvictionConfig) -> dict[str, Prepared]:
    """Every task, checked: model, requests and what they are judged by.

    Raises:
        ProbeError: as `Prepared`. ConfigError: a task has no right answers and there is no `cut`, or the other way
            round. InventoryError: the installed SGLang was not reviewed for kept sets.
    """
    if config.in_engine:
        inventory.require(["bypass", "eviction"])
    out = {}
    layers = resolve_model(config.model).layers
    for task in config.workloads:
        prepared = Prepared(config.recording(task, layers), {FULL: config.arm})
        requests = _with_truth(task, prepared.workload.requests, config.cut)
        prepared.workload = Workload(requests, prepared.workload.skipped, prepared.workload.corpus_digest)
        out[task] = prepared
    return out


def open_folder(folder: Path, config: EvictionConfig, *, overwrite: bool, resume: bool) -> None:
    """Make or check the folder of a study.

    Raises:
        RunDirectoryError: it holds a study, and neither `overwrite` nor `resume` was asked; or another study.
    """
    file = folder / EXPERIMENT_FILE
    # What changes the report alone may change between a run and its resumption.
    wanted = config.model_dump(mode="json", exclude={"name", "output", "resamples"})
    if file.exists() and not overwrite:
        if not resume:
            raise RunDirectoryError(f"{folder} holds a study", fix="--resume finishes it, --overwrite runs it again")
        found = json.loads(file.read_text(encoding="utf-8"))
        changed = [k for k in wanted if found.get(k) != json.loads(json.dumps(wanted[k]))]
        if changed:
            raise RunDirectoryError(f"{folder} holds a study with another `{changed[0]}`", fix="use --overwrite")
    if file.exists() and overwrite:
        # Otherwise an interrupted overwrite would be resumed with stages of the study that it replaces.
        _discard(folder, json.loads(file.read_text(encoding="utf-8"))["workloads"])
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _discard(folder: Path, tasks: Iterable[str]) -> None:
    """Delete the tables of a study and all runs and kept sets of its tasks."""
    for name in (OFFLINE_FILE, HEADS_FILE, EXCLUDED_FILE):
        (folder / name).unlink(missing_ok=True)
    for path in (p for task in tasks for p in folder.glob(f"{glob.escape(task)}.*")):
        if (path / MANIFEST).exists():
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def run_full(
    prepared: dict[str, Prepared],
    config: EvictionConfig,
    folder: Path,
    host: EngineHost,
    *,
    overwrite: bool,
    resume: bool,
    reporter: Reporter,
) -> dict[str, dict[str, Run]]:
    """Per task the full-cache run (`full`), and the one that decodes the reference (`reference`), on one engine."""
    runs: dict[str, dict[str, Run]] = {}
    for task, ours in prepared.items():
        runs[task] = {}
        for kind in (FULL, REFERENCE):
            path = folder / f"{task}.{kind}"
            this = copy.copy(ours)
            requests = ours.workload.requests
            if kind == REFERENCE:
                requests = [_forced(r) for r in requests]
            this.workload = Workload(requests, ours.workload.skipped, ours.workload.corpus_digest)
            wanted = manifest_of(this, path, config.arm, kind, None, None)
            run = complete_run(path, wanted) if resume else None
            runs[task][kind] = run or harvest(
                this,
                path,
                config.arm,
                arm_name=f"{task}, {kind}",
                overwrite=overwrite,
                resume=resume and path.exists(),
                reporter=reporter,
                host=host,
                hooks=Hooks(forced_outputs=True, bypass=config.in_engine, evictions=config.in_engine),
            )
    return runs


def run_lookahead(
    prepared: Prepared,
    asked: Sequence[Asked],
    path: Path,
    host: EngineHost,
    *,
    overwrite: bool,
    resume: bool,
    reporter: Reporter,
) -> Run:
    """Generate lookahead tokens under kept sets, or run pseudo and draft tokens, with captured attention rows."""
    if resume and (path / MANIFEST).exists() and (run := load_run(path)).complete:
        return run
    sources = {r.rid: r for r in prepared.workload.requests}
    sets = path.with_name(path.name + ".kept.safetensors")
    kept = {a.rid: a.kept for a in asked if a.kept is not None}
    if kept:
        write_kept(sets, kept)
    greedy = {"temperature": 0.0, "ignore_eos": True}
    requests = []
    for a in asked:
        prompt = sources[a.source].prompt_ids[: a.context]
        if a.kept is None and a.at[1] == DAPQ:
            requests.append(EvictedRequest(a.rid, (*prompt, *a.pseudo), None, None, {**greedy, "max_new_tokens": 1}))
        else:
            # The last token that is sampled has no query.
            new = {**greedy, "max_new_tokens": a.steps + 1}
            requests.append(EvictedRequest(a.rid, prompt, a.rid if a.kept else None, a.pseudo or None, new))
    return run_evicted(
        prepared,
        path,
        requests,
        kept=sets if kept else None,
        host=host,
        overwrite=overwrite or resume,
        reporter=reporter,
    )


def full_runs(config: EvictionConfig, folder: Path) -> dict[str, dict[str, Run]]:
    """The full-cache runs of a study that was harvested."""
    return {t: {k: load_run(folder / f"{t}.{k}") for k in (FULL, REFERENCE)} for t in config.workloads}


def run_arm(
    prepared: Prepared,
    asked: pd.DataFrame,
    path: Path,
    kept: Path,
    host: EngineHost,
    *,
    overwrite: bool,
    resume: bool,
    reporter: Reporter,
) -> Run:
    """Serve the requests of one task and one way of decoding under their kept sets.

    Args:
        asked: one row per request: rid, source (rid of the workload's request), key (null: full cache), forced
            (whether the reference is decoded), and temperature.
    """
    if resume and (path / MANIFEST).exists() and (run := load_run(path)).complete:
        return run
    sources = {r.rid: r for r in prepared.workload.requests}
    requests = [_evicted(r, sources[r.source]) for r in asked.itertuples()]
    return run_evicted(prepared, path, requests, kept=kept, host=host, overwrite=overwrite or resume, reporter=reporter)


def arms(config: EvictionConfig) -> list[tuple[str, Decode, bool]]:
    """Ways of decoding: name, sampling, and whether the reference is forced."""
    out = [(d.name, d, False) for d in config.decode]
    return [*out, ("forced", Decode(), True)] if config.teacher_forced else out


def _evicted(row: Any, source: Request) -> EvictedRequest:
    own = dict(source.sampling_params)
    probe = (own.pop("custom_params", None) or {}).get("probe", {})
    assert source.truth is not None
    force = source.truth.continuation_ids if row.forced else probe.get("force")
    own["temperature"] = row.temperature
    key = None if row.key is None or pd.isna(row.key) else str(row.key)
    return EvictedRequest(row.rid, source.prompt_ids, key, force, own, family=source.rid)


def _forced(request: Request) -> Request:
    assert request.truth is not None
    params = dict(request.sampling_params)
    params["custom_params"] = {"probe": {"force": list(request.truth.continuation_ids)}}
    return replace(request, sampling_params=params)


def _with_truth(task: str, requests: list[Request], cut: Cut | None) -> list[Request]:
    """The requests that can be judged.

    Raises:
        WorkloadError: some have right answers and some do not, or `cut` is missing or has no meaning.
    """
    known = [r for r in requests if r.truth is not None]
    if known and len(known) < len(requests):
        raise WorkloadError(f"task `{task}`: {len(known)} of {len(requests)} requests have right answers")
    if known:
        if any(len(r.truth.continuation_ids) < 2 for r in known if r.truth):
            raise WorkloadError(f"task `{task}`: one answer comes from prefill alone", fix="use two `answers` or more")
        return known
    if cut is None:
        raise ConfigError(
            f"task `{task}` has no right answers", fix="say by `cut` what is prompt, question and reference"
        )
    return list(_cut(requests, cut, task))


def _cut(requests: Iterable[Request], cut: Cut, task: str) -> Iterable[Request]:
    """Requests with tokens enough, cut to prompt and reference. Those that are too short are left out."""
    p, n = cut.prompt_tokens, 0
    for r in requests:
        if len(r.prompt_ids) < p + cut.steps:
            continue
        n += 1
        prompt, reference = r.prompt_ids[:p], r.prompt_ids[p : p + cut.steps]
        context = p - cut.question_tokens
        truth = Truth(
            task=task,
            prompt_ids=prompt,
            context_len=context,
            continuation_ids=reference,
            answer_ids=reference,
            answer_steps=tuple(range(cut.steps)),
            needed_content=(),
            needed_causal=None,
            depth=float("nan"),
        )
        spans = (SegmentSpan("context", 0, context), SegmentSpan("question", context, p))
        yield replace(r, prompt_ids=prompt, spans=spans, labels=(), truth=truth)
    if n < 2:
        raise WorkloadError(
            f"task `{task}`: {n} texts have {p + cut.steps} tokens", fix="longer texts, or a shorter cut"
        )
