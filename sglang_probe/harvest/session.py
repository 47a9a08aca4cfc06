"""One harvest: an engine, a workload, an arm, a run directory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from sglang_probe.capture import journal
from sglang_probe.capture.hook_points import EMBED, check_hook_points, engine_module
from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.harvest import directory
from sglang_probe.harvest.config import Recording
from sglang_probe.harvest.engine import Answer, ProbedEngine, fault_of
from sglang_probe.harvest.model import Model, resolve_model
from sglang_probe.harvest.progress import Quiet, Reporter
from sglang_probe.hooks import inventory
from sglang_probe.hooks.config import EngineProbeConfig
from sglang_probe.hooks.supported import refuse_unsupported
from sglang_probe.ledger.ownership import load_embedding, write_oracle
from sglang_probe.ledger.run import Run, load_run
from sglang_probe.policy.arm import Arm
from sglang_probe.workload.build import Workload, build_requests

_OURS = {"model_path", "dtype", "disable_radix_cache"}


class Prepared:
    """Everything that can be checked without an engine: model, workload, arguments.

    Raises (on construction):
        ProbeError: a child of it for every kind of bad input; nothing has been written by then.
    """

    def __init__(self, config: Recording, arms: Mapping[str, Arm]) -> None:
        self.config = config
        for server in (config.server, *(a.server for a in arms.values())):
            refuse_unsupported(dict(server))
            if taken := _OURS & set(server):
                raise ConfigError(
                    f"server argument `{min(taken)}` is set by the probe",
                    fix="use `model`, `dtype` and the arm's `cache`",
                )
        self.inventory = inventory.require(["accounting", "control", "rows", "forced decoding", "platform"])
        self.model: Model = resolve_model(config.model)
        check_hook_points(config.hook_points, self.model.layers)
        context = int(config.server.get("context_length") or self.model.context_length)
        self.workload: Workload = build_requests(
            config.workload, self.model.tokenizer, context_length=context, default_sampling=dict(config.sampling)
        )


def harvest(
    prepared: Prepared,
    path: Path,
    arm: Arm,
    *,
    arm_name: str = "harvest",
    outputs_of: Run | None = None,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Run an engine over the workload under `arm` and write the run directory `path`.

    Args:
        outputs_of: a run whose output tokens are forced here, so that both decode the same text.
        overwrite, resume: what to do if `path` exists.

    Raises:
        RunDirectoryError: `path` exists, or cannot be resumed.
        ProbeError: the recording failed; the directory says `incomplete`, and why.
        KeyboardInterrupt: passed on after the engine ended and the directory was closed as `incomplete`.
    """
    reporter = reporter or Quiet()
    config = prepared.config
    server = {"dtype": config.dtype, **config.server, **arm.server_args()}
    manifest = directory.new_manifest(
        name=path.name,
        arm=arm_name,
        policy=arm.model_dump(mode="json"),
        model=prepared.model.identity(),
        model_path=prepared.model.path,
        dtype=config.dtype,
        hook_points={h: engine_module(h) for h in config.hook_points},
        workload=config.workload.model_dump(mode="json"),
        workload_digest=prepared.workload.digest,
        corpus_digest=prepared.workload.corpus_digest,
        sampling=config.sampling,
        concurrency=config.concurrency,
        server_given=server,
        forced_from=None if outputs_of is None else outputs_of.manifest["name"],
        inventory={"sglang": prepared.inventory.sglang, "version": prepared.inventory.version},
        requests_expected=len(prepared.workload.requests),
        lines_skipped=prepared.workload.skipped,
        privacy="ids",
    )
    start = directory.open_directory(path, manifest, overwrite=overwrite, resume=resume)
    if start.session:
        manifest["sessions"] = load_run(path).manifest.get("sessions", [])
    probe = EngineProbeConfig(
        run=path.resolve(),
        hook_points=config.hook_points,
        forced_outputs=outputs_of is not None,
        session=start.session,
        first_part=start.part,
        first_forward=start.forward,
        first_row=start.row,
        checkpoint_seconds=config.checkpoint_seconds,
        ignore_interrupt=True,
    )
    todo = _remaining(prepared, path, start, outputs_of)
    try:
        with reporter.stage(f"{arm_name}: starting SGLang"):
            engine = ProbedEngine(prepared.model.path, probe, server).__enter__()
    except (ValueError, TypeError) as e:  # SGLang refuses an argument
        raise ConfigError(
            f"SGLang refuses the server arguments: {e}", fix="see `python -m sglang.launch_server --help`"
        ) from e
    seconds, answers = 0.0, []
    try:
        with reporter.requests(f"{arm_name}: requests", len(todo)) as counter:
            began = time.perf_counter()

            async def serve() -> None:
                async for answer in engine.serve(todo, config.concurrency):
                    answers.append(answer)
                    counter.advance(len(answer.output_ids))

            try:
                engine.run(serve())
            finally:
                seconds = time.perf_counter() - began
        engine.close_recording()
    finally:
        resolved = engine.server_args
        engine.__exit__()
        manifest.setdefault("sessions", []).append({"seconds": round(seconds, 3), "requests": len(answers)})
        manifest["server_resolved"] = resolved
        _close(path, manifest, prepared, answers)
    return load_run(path)


def _remaining(
    prepared: Prepared, path: Path, start: directory.Start, outputs_of: Run | None
) -> list[tuple[str, Sequence[int], dict[str, Any]]]:
    """Requests still to be served: (rid, prompt, sampling parameters with the forced outputs)."""
    forced: dict[int, list[int]] = {}
    if outputs_of is not None:
        served = outputs_of.requests()
        forced = {r.index: r.output_ids.tolist() for r in served.itertuples() if r.output_ids is not None}
    done: set[str] = set()
    if start.session:
        done = {rid.split("~")[0] for rid in directory.served(path)}
    todo: list[tuple[str, Sequence[int], dict[str, Any]]] = []
    for r in prepared.workload.requests:
        if r.rid in done:
            continue
        params = dict(r.sampling_params)
        if outputs_of is not None:
            if r.index not in forced:
                raise ProbeError(
                    f"{outputs_of.path} has no output for request {r.index}", fix="finish it with --resume first"
                )
            params["custom_params"] = {"probe": {"force": forced[r.index]}}
        todo.append((f"{r.rid}~{start.session}" if start.session else r.rid, r.prompt_ids, params))
    return todo


def _close(path: Path, manifest: dict[str, Any], prepared: Prepared, answers: list[Answer]) -> None:
    """Write `requests.parquet` and the final manifest, and say why a run is incomplete."""
    run = load_run(path)
    counts = directory.write_requests(run, prepared.workload.requests)
    rows = max((p.rows_end for p in run.parts()), default=0)
    if rows and EMBED in run.hook_points and (embedding := load_embedding(prepared.model.path)) is not None:
        requests = run.requests()
        write_oracle(run, embedding, chain(*requests["prompt_ids"], *requests["output_ids"].dropna()))
    ended = run.engine_requests().set_index("rid")
    served = {rid.split("~")[0] for rid in ended.index}
    fault = fault_of(path)
    disagreements = [
        a.rid for a in answers if a.rid in ended.index and int(ended.at[a.rid, "cached_tokens"]) != a.cached_tokens
    ]
    complete = fault is None and len(served) == len(prepared.workload.requests)
    spans = run.spans()
    lengths = spans["end"] - spans["start"]
    manifest.update(
        status="complete" if complete else "incomplete",
        fault=fault,
        requests_by_finish=counts,
        positions_by_status={k: int(v) for k, v in lengths.groupby(spans["status"]).sum().items()},
        positions_by_phase={k: int(v) for k, v in lengths.groupby(spans["phase"]).sum().items()},
        rows=rows,
        rows_dtype=str(run.rows(run.hook_points[0], [0]).dtype).removeprefix("torch.") if rows else None,
        rows_dropped=0,
        cached_tokens_disagreements=disagreements,
        files={name: digest for p in run.parts() for name, digest in p.files.items()},
    )
    directory.write_manifest(path, manifest)
    if fault is not None:
        raise ProbeError(
            f"the recording of {path} is incomplete: {fault}",
            fix="report this; the run cannot be trusted beyond its last part",
        )
    journal.discard_leftovers(path)
