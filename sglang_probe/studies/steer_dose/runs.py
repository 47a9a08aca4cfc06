"""The runs of the study: candidates of features, every arm teacher-forced on both kinds of text, and every arm going on
by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sglang_probe.ask import Ask
from sglang_probe.errors import WorkloadError
from sglang_probe.harvest.experiment import Runs, RunSpec, record
from sglang_probe.harvest.prepare import Prepared, check_requests
from sglang_probe.harvest.prepare import prepare as check
from sglang_probe.harvest.progress import Reporter
from sglang_probe.run.hook_points import EMBED
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.steer_decay.target import token_ids
from sglang_probe.studies.steer_dose.config import DoseArm, SteerDoseConfig
from sglang_probe.studies.steer_dose.names import FORCED, FREE, NEUTRAL, PLAIN, SELECTION, TEXT, Place
from sglang_probe.studies.steer_dose.select import (
    LIBRARY,
    candidates,
    chosen,
    feature_name,
    output_scores,
    selecting,
    write_library,
)
from sglang_probe.workload.build import Workload, build_requests
from sglang_probe.workload.request import Request, SegmentSpan

__all__ = ["ASKS", "planned", "prepare", "read", "run", "specs_of"]

ASKS = ("force", "steer")
"""What the engine must honour."""


@dataclass(frozen=True)
class Texts:
    """What is served: texts that the features are chosen on, texts that are measured, neutral ones."""

    selection: Sequence[Request]
    texts: Sequence[Request]
    neutral: Sequence[Request]
    prefixes: dict[str, tuple[int, ...]]
    """Token ids of each prefix."""


def prepare(config: SteerDoseConfig) -> Prepared:
    """Check model, library, target, SAE and texts; starts no engine.

    Raises:
        ConfigError: a vector is not in the library or cannot be what an arm makes of it; a target is no token.
        WorkloadError: too few texts are long enough.
        ProbeError: as `sglang_probe.harvest.prepare.prepare`.
    """
    prepared = check(config, {"arm": config.arm})
    model = Path(prepared.model.path)
    assert prepared.library is not None
    for tokens in (config.target.positive, config.target.negative):
        token_ids(model, tokens)
    for arm in config.arms.values():
        for name in arm.vectors or ():
            prepared.library[name]
    if config.select is not None:
        candidates(config, model)
    texts = texts_of(prepared, config)
    check_requests(list(_forced(texts, config, [])), prepared)
    return prepared


def run(
    prepared: Prepared,
    config: SteerDoseConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Run]:
    """Record all runs in one engine. `resume`: as `sglang_probe.harvest.experiment.record`.

    Raises:
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked; or it is of something else.
        ProbeError: a recording failed.
    """
    specs, prepared = specs_of(prepared, config, folder)
    return record(specs, prepared, folder, asks=ASKS, overwrite=overwrite, resume=resume, reporter=reporter)


def specs_of(prepared: Prepared, config: SteerDoseConfig, folder: Path) -> tuple[list[RunSpec], Prepared]:
    """What `run` records, and with what: with `select`, the library of the study is written first, and takes the place
    of the user's.

    Raises:
        RunDirectoryError: there is another folder where that library belongs.
        ProbeError: an entry of it cannot be made.
    """
    texts = texts_of(prepared, config)
    if config.select is not None:
        assert config.steer is not None
        library = write_library(config, Path(prepared.model.path), folder / LIBRARY)
        steer = config.steer.model_copy(update={"library": library})
        workload: Workload = prepared.workload
        prepared = check(config.model_copy(update={"steer": steer}), {"arm": config.arm}, workload=workload)
    # The same in every run, whether it needs them or not: another set of taps is another engine.
    points = [EMBED, f"blocks.{prepared.model.layers - 1}.hook_resid_post"]
    specs = []
    if config.select is not None:
        tried = list(_selection(texts, config, Path(prepared.model.path)))
        specs.append(RunSpec(SELECTION, tried, config.arm, hook_points=points))
    specs.append(RunSpec(FORCED, partial(_of_chosen, _forced, texts, config), config.arm, hook_points=points))
    if config.free_steps:
        specs.append(RunSpec(FREE, partial(_of_chosen, _free, texts, config), config.arm, hook_points=points))
    return specs, prepared


def read(config: SteerDoseConfig, folder: Path) -> dict[str, Run]:
    """The runs that are in `folder`, by name.

    Raises:
        RunDirectoryError: one is missing.
    """
    names = [SELECTION] * (config.select is not None) + [FORCED] + [FREE] * (config.free_steps > 0)
    return {name: load_run(folder / name) for name in names}


def planned(prepared: Prepared, config: SteerDoseConfig) -> list[tuple[str, int, int]]:
    """Of each run its name, its requests, and the tokens that they decode. Any candidates stand for those that will be
    chosen."""
    texts = texts_of(prepared, config)
    some: list[str] = []
    runs: dict[str, list[Request]] = {}
    if config.select is not None:
        some = [feature_name(i) for i in range(config.select.take)]
        runs[SELECTION] = list(_selection(texts, config, Path(prepared.model.path)))
    runs[FORCED] = list(_forced(texts, config, some))
    if config.free_steps:
        runs[FREE] = list(_free(texts, config, some))
    return [(n, len(rs), sum(int(r.sampling_params["max_new_tokens"]) for r in rs)) for n, rs in runs.items()]


def texts_of(prepared: Prepared, config: SteerDoseConfig) -> Texts:
    """Texts that are long enough.

    Raises:
        WorkloadError: fewer than two are left of either kind.
    """
    tokenizer = prepared.model.tokenizer
    neutral = build_requests(
        config.neutral, tokenizer, context_length=prepared.room, default_sampling={"max_new_tokens": 1}
    )
    length = config.prompt_tokens + config.steps + 1
    fitting, apart = (
        [r for r in requests if len(r.prompt_ids) >= length]
        for requests in (prepared.workload.requests, neutral.requests)
    )
    some = selecting(config.select)
    found = Texts(
        fitting[:some],
        fitting[some : some + config.most_texts],
        apart[: config.most_texts],
        {
            prefix: tuple(tokenizer(prefix, add_special_tokens=False)["input_ids"])
            for arm in config.arms.values()
            for prefix in arm.prefixes or ()
        },
    )
    for kind, texts in (("texts of the workload", found.texts), ("neutral texts", found.neutral)):
        if len(texts) < 2:
            raise WorkloadError(
                f"{len(texts)} {kind} are left that have {length} tokens",
                fix="longer texts, fewer `prompt_tokens` and `steps`, or a smaller `select.texts`",
            )
    return found


def _of_chosen(make: object, texts: Texts, config: SteerDoseConfig, runs: Runs) -> list[Request]:
    features = [] if config.select is None else chosen(output_scores(runs[SELECTION], config))
    return list(make(texts, config, features))  # type: ignore[operator]


def _selection(texts: Texts, config: SteerDoseConfig, model: Path) -> Iterator[Request]:
    assert config.select is not None
    arm = DoseArm(selected=True, doses=[config.select.dose])
    number = 0
    for text in texts.selection:
        for place, ask in _asked(text, TEXT, {"candidate": arm}, [feature_name(i) for i in candidates(config, model)]):
            yield _request(number, text, place, config, ask, forced=True)
            number += 1


def _forced(texts: Texts, config: SteerDoseConfig, features: Sequence[str]) -> Iterator[Request]:
    """A request for every text, arm, vector and dose, over the text's own tokens."""
    number = 0
    for scope, some in ((TEXT, texts.texts), (NEUTRAL, texts.neutral)):
        for text in some:
            for place, ask in _asked(text, scope, config.arms, features):
                prefix = _prefix(place, config, texts)
                yield _request(number, text, place, config, ask, forced=True, prefix=prefix)
                number += 1


def _free(texts: Texts, config: SteerDoseConfig, features: Sequence[str]) -> Iterator[Request]:
    """The same of the texts that steering is for, going on by themselves."""
    number = 0
    for text in texts.texts:
        for place, ask in _asked(text, TEXT, config.arms, features):
            prefix = _prefix(place, config, texts)
            yield _request(number, text, place, config, ask, forced=False, prefix=prefix)
            number += 1


def _asked(
    text: Request, scope: str, arms: dict[str, DoseArm], features: Sequence[str]
) -> Iterator[tuple[Place, Ask | None]]:
    yield Place(text.rid, scope, PLAIN, "-", 0), None
    for name, arm in arms.items():
        for number in range(1, len(arm.prefixes or ()) + 1):
            yield Place(text.rid, scope, name, "prefix", number), None
        for vector in features if arm.selected else arm.vectors or ():
            for number, dose in enumerate(arm.doses, start=1):
                yield Place(text.rid, scope, name, vector, number), Ask(steer=(arm.steer(vector, dose),))


def _prefix(place: Place, config: SteerDoseConfig, texts: Texts) -> tuple[int, ...]:
    prefixes = config.arms[place.arm].prefixes if place.arm in config.arms else None
    return texts.prefixes[prefixes[place.dose - 1]] if prefixes else ()


def _request(
    index: int,
    text: Request,
    place: Place,
    config: SteerDoseConfig,
    ask: Ask | None,
    *,
    forced: bool,
    prefix: tuple[int, ...] = (),
) -> Request:
    start = config.prompt_tokens
    prompt = (*prefix, *text.prompt_ids[:start])
    # One token more is decoded than steps are measured: the last one never runs through the model.
    steps = config.steps if forced else config.free_steps
    params: dict[str, object] = {"max_new_tokens": steps + 1, "ignore_eos": True}
    if forced:
        params = Ask(force=tuple(text.prompt_ids[start : start + steps + 1])).into({**params, "temperature": 0.0})
    else:
        params = {**config.sampling, **params}
    if ask is not None:
        params = ask.into(params)
    spans = [SegmentSpan("prefix", 0, len(prefix))] if prefix else []
    spans.append(SegmentSpan("prompt", len(prefix), len(prompt)))
    family = text.family or text.rid
    return Request(index, place.rid, tuple(prompt), tuple(spans), family, params, source=text.source)
