"""The runs of the phase study: human text prefilled, the model's own text decoded, and that text prefilled again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sglang_probe.errors import WorkloadError
from sglang_probe.harvest.experiment import Runs, RunSpec, record
from sglang_probe.harvest.prepare import Prepared, check_requests
from sglang_probe.harvest.prepare import prepare as check
from sglang_probe.harvest.progress import Reporter
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.ab.plan import REPEAT
from sglang_probe.studies.phase.config import PhaseConfig
from sglang_probe.studies.phase.study import DECODED, HUMAN, REFORWARD
from sglang_probe.workload.request import Request, SegmentSpan

__all__ = ["prepare", "read", "run"]

KINDS = (HUMAN, DECODED, REFORWARD)


def prepare(config: PhaseConfig) -> Prepared:
    """Check model and texts; starts no engine.

    Raises:
        WorkloadError: fewer than two texts are long enough, or prompt and continuation do not fit into the context.
        ProbeError: as `sglang_probe.harvest.prepare.prepare`.
    """
    prepared = check(config, {"arm": config.arm})
    prepare_texts(prepared, config)
    return prepared


def prepare_texts(prepared: Prepared, config: PhaseConfig) -> None:
    """Refuse texts that cannot be recorded.

    Raises:
        WorkloadError: as `prepare`.
    """
    texts = texts_of(prepared, config)
    for kind in (HUMAN, DECODED):  # a forward pass of what was decoded is as long as human text
        check_requests(requests_of(kind, texts, config, {}), prepared)


def run(
    prepared: Prepared,
    config: PhaseConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, list[Run]]:
    """Record all runs in one engine; by kind, each with its replicates. `resume`: as
    `sglang_probe.harvest.experiment.record`.

    Raises:
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked; or it is of something else.
        ProbeError: a recording failed.
    """
    texts = texts_of(prepared, config)
    specs = [
        RunSpec(
            name,
            partial(requests_of, kind, texts, config),
            config.arm,
            outputs_of=DECODED if kind == DECODED and name != DECODED else None,
            order_seed=replicate or None,
        )
        for replicate, names in enumerate(zip(*(names_of(kind, config) for kind in KINDS), strict=True))
        for kind, name in zip(KINDS, names, strict=True)
    ]
    found = record(specs, prepared, folder, overwrite=overwrite, resume=resume, reporter=reporter)
    return {kind: [found[name] for name in names_of(kind, config)] for kind in KINDS}


def read(config: PhaseConfig, folder: Path) -> dict[str, list[Run]]:
    """The runs that are in `folder`, by kind, each with its replicates.

    Raises:
        RunDirectoryError: one is missing.
    """
    return {kind: [load_run(folder / name) for name in names_of(kind, config)] for kind in KINDS}


def names_of(kind: str, config: PhaseConfig) -> list[str]:
    """The runs of a kind, one by replicate."""
    return [kind, kind + REPEAT][: config.replicates]


def texts_of(prepared: Prepared, config: PhaseConfig) -> list[Request]:
    """Requests whose prompt is long enough, cut to prompt and continuation."""
    length = config.prompt_tokens + config.continuation_tokens
    texts = [r for r in prepared.workload.requests if len(r.prompt_ids) >= length]
    if len(texts) < 2:
        raise WorkloadError(
            f"{len(texts)} texts of {len(prepared.workload.requests)} have {length} tokens",
            fix="longer texts (`chars`), or fewer `prompt_tokens` and `continuation_tokens`",
        )
    return texts


def requests_of(kind: str, texts: Sequence[Request], config: PhaseConfig, runs: Runs) -> list[Request]:
    """The requests of one kind of run.

    One token more is decoded than is compared: the last sampled token never runs through the model.
    """
    p, c = config.prompt_tokens, config.continuation_tokens
    outputs: dict[int, list[int]] = {}
    if kind == REFORWARD:
        outputs = {r.index: r.output_ids.tolist() for r in runs[DECODED].requests().itertuples()}
    requests = []
    for r in texts:
        prompt = list(r.prompt_ids[:p])
        if kind == DECODED:
            params = {**config.sampling, "max_new_tokens": c + 1, "ignore_eos": True}
        else:
            prompt += list(r.prompt_ids[p : p + c]) if kind == HUMAN else outputs[r.index][:c]
            params = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        spans = [SegmentSpan("prompt", 0, p)]
        if len(prompt) > p:
            spans.append(SegmentSpan("continuation", p, len(prompt)))
        requests.append(Request(r.index, r.rid, tuple(prompt), tuple(spans), r.family, params, source=r.source))
    return requests
