"""The harvest of the phase study: human text prefilled, the model's own text decoded, and that text prefilled again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from sglang_probe.errors import WorkloadError
from sglang_probe.harvest.config import Recording, refuse_rows
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.progress import Reporter
from sglang_probe.harvest.recording import Hooks, harvest, manifest_of
from sglang_probe.policy.arm import Arm
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.ab.plan import REPEAT
from sglang_probe.studies.ab.runs import complete_run
from sglang_probe.studies.phase.study import DECODED, HUMAN, REFORWARD
from sglang_probe.workload.build import Workload, WorkloadConfig
from sglang_probe.workload.documents import Documents
from sglang_probe.workload.request import Request, SegmentSpan

KINDS = (HUMAN, DECODED, REFORWARD)


class PhaseConfig(Recording):
    """A phase study. Every text is cut to `prompt_tokens` and a continuation, whose positions are compared."""

    name: str | None = None
    workload: WorkloadConfig = Field(default_factory=Documents)
    prompt_tokens: int = Field(default=128, ge=1)
    continuation_tokens: int = Field(default=128, ge=1)
    sampling: dict[str, Any] = Field(default_factory=lambda: {"temperature": 1.0})
    """Of the decoded continuation; its length is set by `continuation_tokens`."""
    replicates: int = Field(default=2, ge=1, le=2)
    """2: every run once more, in another order, for the floor."""

    @model_validator(mode="after")
    def _compares_all_positions(self) -> PhaseConfig:
        refuse_rows(self)
        return self

    @property
    def arm(self) -> Arm:
        """Nothing is reused, so that every position is computed in its own phase."""
        return Arm(cache="off")


def runs_in(folder: Path, config: PhaseConfig) -> dict[str, list[Run]]:
    """The runs of a study that was harvested, by kind, each with its replicates."""
    return {k: [load_run(folder / name) for name in _names(k, config)] for k in KINDS}


def _names(kind: str, config: PhaseConfig) -> list[str]:
    return [kind, kind + REPEAT][: config.replicates]


def run_phase(
    prepared: Prepared,
    config: PhaseConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, list[Run]]:
    """Harvest all runs in one engine. With `resume`, complete runs are kept.

    Raises:
        WorkloadError: fewer than two texts are long enough.
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked.
        ProbeError: a recording failed.
    """
    texts = _texts(prepared, config)
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    with EngineHost() as host:
        for replicate in range(config.replicates):
            for kind in runs:
                name = _names(kind, config)[replicate]
                first = runs[DECODED][0] if runs[DECODED] else None
                ours = copy.copy(prepared)
                ours.workload = Workload(_requests(kind, texts, config, first), 0, prepared.workload.corpus_digest)
                outputs_of = first if kind == DECODED else None
                path, order = folder / name, replicate or None
                wanted = manifest_of(ours, path, config.arm, name, outputs_of, order)
                run = complete_run(path, wanted) if resume else None
                if run is None:
                    run = harvest(
                        ours,
                        path,
                        config.arm,
                        arm_name=name,
                        outputs_of=outputs_of,
                        order_seed=order,
                        overwrite=overwrite,
                        resume=resume and path.exists(),
                        reporter=reporter,
                        host=host,
                        hooks=Hooks(forced_outputs=True),
                    )
                runs[kind].append(run)
    return runs


def _texts(prepared: Prepared, config: PhaseConfig) -> list[Request]:
    """Requests whose prompt is long enough, cut to prompt and continuation."""
    length = config.prompt_tokens + config.continuation_tokens
    texts = [r for r in prepared.workload.requests if len(r.prompt_ids) >= length]
    if len(texts) < 2:
        raise WorkloadError(
            f"{len(texts)} texts of {len(prepared.workload.requests)} have {length} tokens",
            fix="longer texts (`chars`), or fewer `prompt_tokens` and `continuation_tokens`",
        )
    return texts


def _requests(kind: str, texts: list[Request], config: PhaseConfig, decoded: Run | None) -> list[Request]:
    """The requests of one kind of run.

    One token more is decoded than is compared: the last sampled token never runs through the model.
    """
    p, c = config.prompt_tokens, config.continuation_tokens
    outputs: dict[int, list[int]] = {}
    if kind == REFORWARD:
        assert decoded is not None
        outputs = {r.index: r.output_ids.tolist() for r in decoded.requests().itertuples()}
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
        requests.append(Request(r.index, r.rid, tuple(prompt), tuple(spans), r.family, params))
    return requests
