"""The runs: every text computed whole, its end after a cached prefix, and the same tokens decoded beside others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sglang_probe.ask import Ask
from sglang_probe.errors import WorkloadError
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.prepare import Prepared, check_requests
from sglang_probe.harvest.prepare import prepare as check
from sglang_probe.harvest.progress import Reporter
from sglang_probe.policy.arm import Arm
from sglang_probe.policy.partners import Partners
from sglang_probe.run import journal
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.ab.plan import REPEAT
from sglang_probe.studies.row_counts.config import RowCountsConfig
from sglang_probe.studies.row_counts.products import PRODUCTS, products_json
from sglang_probe.studies.row_counts.study import DECODE, TAILS, WHOLE
from sglang_probe.workload.request import Request, SegmentSpan

__all__ = ["planned", "prepare", "read", "run"]

ASKS = {"force", "cache"}
"""For one engine for all runs."""
ALONE = Partners(count=0)
"""A forward has the rows of one request, so their number is known."""


def prepare(config: RowCountsConfig) -> Prepared:
    """Check model and texts; starts no engine.

    Raises:
        WorkloadError: fewer than two texts are long enough.
        ProbeError: as `sglang_probe.harvest.prepare.prepare`.
    """
    prepared = check(config, {spec.name: spec.arm for spec in _specs([], config)})
    for spec in _specs(_texts(prepared, config), config):
        if not callable(spec.requests):
            check_requests(spec.requests, prepared)
    return prepared


def run(
    prepared: Prepared,
    config: RowCountsConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Run]:
    """Record all runs in one engine, and what the bare products do on this machine. `resume`: as
    `sglang_probe.harvest.experiment.record`.

    Raises:
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked; or it is of something else.
        ProbeError: a recording failed.
    """
    specs = _specs(_texts(prepared, config), config)
    runs = record(specs, prepared, folder, asks=ASKS, overwrite=overwrite, resume=resume, reporter=reporter)
    dtype = runs[WHOLE].manifest["rows_dtype"]
    counts = [*config.row_counts, *config.decode_batches]
    found = products_json(runs[WHOLE].manifest["model_config"], dtype, counts, config.prefix_tokens)
    journal.write_text_durably(folder / PRODUCTS, found)
    return runs


def read(config: RowCountsConfig, folder: Path) -> dict[str, Run]:
    """The runs that are in `folder`, by name.

    Raises:
        RunDirectoryError: one is missing.
    """
    return {spec.name: load_run(folder / spec.name) for spec in _specs([], config)}


def planned(prepared: Prepared, config: RowCountsConfig) -> list[tuple[str, int, int]]:
    """Of every run its name, its requests, and the tokens of all their prompts."""
    specs = _specs(_texts(prepared, config), config)
    given = [(s.name, s.requests) for s in specs if not callable(s.requests)]
    return [(name, len(requests), sum(len(r.prompt_ids) for r in requests)) for name, requests in given]


def _specs(texts: Sequence[Request], config: RowCountsConfig) -> list[RunSpec]:
    """All runs; arms alone if there are no texts."""
    whole = [_request(i, f"t{i}", t, config.length, config) for i, t in enumerate(texts)]
    off = Arm(cache="off", partners=ALONE)
    specs = [
        RunSpec(WHOLE, whole, off),
        RunSpec(WHOLE + REPEAT, whole, off, order_seed=1),
        RunSpec(TAILS, _tails(texts, config), Arm(partners=ALONE)),
    ]
    for beside in config.decode_batches:
        arm = Arm(cache="off", partners=Partners(count=beside - 1))
        specs.append(RunSpec(f"{DECODE}-{beside}", _decoded(texts, beside, config), arm))
    return specs


def _tails(texts: Sequence[Request], config: RowCountsConfig) -> list[Request]:
    """Of every text its prefix, which is published, then the prefix and as many tokens as a forward shall compute."""
    requests: list[Request] = []
    for t, text in enumerate(texts):
        publish, reuse = (Ask(cache=use) for use in ("write_only", "read_only"))
        requests.append(_request(len(requests), f"t{t}-prefix", text, config.prefix_tokens, config, ask=publish))
        for m in config.row_counts:
            length = config.prefix_tokens + m
            requests.append(_request(len(requests), f"t{t}-{m}", text, length, config, ask=reuse))
    return requests


def _decoded(texts: Sequence[Request], beside: int, config: RowCountsConfig) -> list[Request]:
    """Every text at least once, in full groups of `beside`."""
    requests: list[Request] = []
    p, steps = config.prefix_tokens, config.decode_steps
    while texts and (len(requests) < len(texts) or len(requests) % beside):
        i = len(requests)
        t = i % len(texts)
        force = Ask(force=tuple(texts[t].prompt_ids[p : p + steps + 1]))
        requests.append(_request(i, f"t{t}-{i}", texts[t], p, config, ask=force, new=steps + 1))
    return requests


def _request(
    index: int, rid: str, text: Request, length: int, config: RowCountsConfig, *, ask: Ask | None = None, new: int = 1
) -> Request:
    params = {**config.sampling, "max_new_tokens": new, "ignore_eos": True}
    spans = (SegmentSpan("text", 0, length),)
    sampling = params if ask is None else ask.into(params)
    return Request(index, rid, text.prompt_ids[:length], spans, rid.partition("-")[0], sampling, source=text.source)


def _texts(prepared: Prepared, config: RowCountsConfig) -> list[Request]:
    texts = [r for r in prepared.workload.requests if len(r.prompt_ids) >= config.length]
    if len(texts) < 2:
        raise WorkloadError(
            f"{len(texts)} texts of {len(prepared.workload.requests)} have {config.length} tokens",
            fix="longer texts (`chars`), or fewer `prefix_tokens` and `row_counts`",
        )
    return texts
