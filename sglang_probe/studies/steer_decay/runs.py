"""The runs of the study: the model's own continuation, every arm teacher-forced on it and on the text, and every arm
going on by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sglang_probe.ask import Ask
from sglang_probe.errors import ConfigError, WorkloadError
from sglang_probe.harvest.experiment import Runs, RunSpec, record
from sglang_probe.harvest.prepare import Prepared, check_requests
from sglang_probe.harvest.prepare import prepare as check
from sglang_probe.harvest.progress import Reporter
from sglang_probe.run.hook_points import EMBED, parse_hook_point
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae.folder import read_sae
from sglang_probe.studies.steer_decay.config import SteerDecayConfig
from sglang_probe.studies.steer_decay.names import DECODED, FORCED, FREE, NOTHING, PLAIN, REREAD, SOURCES, rid_of
from sglang_probe.studies.steer_decay.target import token_ids
from sglang_probe.workload.request import Request, SegmentSpan, asked_rid

__all__ = ["downstream_point", "planned", "prepare", "read", "run"]

_ONE = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}


def prepare(config: SteerDecayConfig) -> Prepared:
    """Check model, library, target and texts; starts no engine.

    Raises:
        ConfigError: a vector is not in the library, of another hook point, or no direction; a target is no token.
        WorkloadError: fewer than two texts are long enough, or a continuation does not fit into the context.
        ProbeError: as `sglang_probe.harvest.prepare.prepare`.
    """
    prepared = check(config, {"arm": config.arm})
    library = prepared.library
    assert library is not None
    point = library[config.vector].card.hook_point
    for name in config.random:
        if library[name].card.hook_point != point:
            raise ConfigError(
                f"random: `{name}` is of `{library[name].card.hook_point}`, and `{config.vector}` of `{point}`"
            )
    if config.target is not None:
        for tokens in (config.target.positive, config.target.negative):
            token_ids(Path(prepared.model.path), tokens)
    if config.probe is not None and library[config.probe].card.kind != "probe":
        raise ConfigError(f"probe: `{config.probe}` is a {library[config.probe].card.kind}", fix="`vector make probe`")
    if config.downstream is not None:
        _check_downstream(config, library[config.vector].card.layer, int(prepared.model.config["hidden_size"]))
    texts = _texts(prepared, config)
    check_requests(_decoded(texts, config), prepared)
    check_requests(list(_steered(texts, config, FREE, {})), prepared)
    return prepared


def run(
    prepared: Prepared,
    config: SteerDecayConfig,
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
    texts = _texts(prepared, config)
    # The same in every run, whether it needs them or not: another set of taps is another engine.
    points = _points(prepared, config)
    specs = [
        RunSpec(DECODED, _decoded(texts, config), config.arm, hook_points=points),
        RunSpec(FORCED, partial(_forced, texts, config), config.arm, hook_points=points),
    ]
    if config.free:
        specs.append(RunSpec(FREE, list(_steered(texts, config, FREE, {})), config.arm, hook_points=points))
    if config.probe is not None:
        specs.append(RunSpec(REREAD, partial(_reread, config), config.arm, hook_points=points))
    return record(
        specs, prepared, folder, asks=("force", "steer"), overwrite=overwrite, resume=resume, reporter=reporter
    )


def read(config: SteerDecayConfig, folder: Path) -> dict[str, Run]:
    """The runs that are in `folder`, by name.

    Raises:
        RunDirectoryError: one is missing.
    """
    names = (DECODED, FORCED, *([FREE] if config.free else []), *([REREAD] if config.probe else []))
    return {name: load_run(folder / name) for name in names}


def planned(prepared: Prepared, config: SteerDecayConfig) -> list[tuple[str, int, int]]:
    """Of each run its name, its requests, and the tokens that they decode."""
    texts = _texts(prepared, config)
    nothing = {r.rid: () for r in texts}
    runs = {DECODED: _decoded(texts, config), FORCED: list(_steered(texts, config, FORCED, nothing))}
    if config.free:
        runs[FREE] = list(_steered(texts, config, FREE, {}))
    if config.probe is not None:
        runs[REREAD] = [replace(r, sampling_params=_ONE) for r in runs[FREE]]
    return [(n, len(rs), sum(int(r.sampling_params["max_new_tokens"]) for r in rs)) for n, rs in runs.items()]


def downstream_point(config: SteerDecayConfig) -> str | None:
    """Hook point of the features that are read after the vector's layer; None without any.

    Raises:
        ConfigError: the SAE cannot be read, or does not say where its rows come from.
    """
    if config.downstream is None:
        return None
    sae = read_sae(config.downstream.sae)
    if sae.hook_point is None:
        raise ConfigError(f"{config.downstream.sae} does not say where its rows come from")
    return sae.hook_point


def _points(prepared: Prepared, config: SteerDecayConfig) -> list[str]:
    """What is captured: the last layer's rows come last, and give the predictions."""
    found = [EMBED]
    if (point := downstream_point(config)) is not None:
        found.append(point)
    if config.probe is not None:
        assert prepared.library is not None
        found.append(prepared.library[config.probe].card.hook_point)
    last = f"blocks.{prepared.model.layers - 1}.hook_resid_post"
    return [*dict.fromkeys(p for p in found if p != last), last]


def _check_downstream(config: SteerDecayConfig, layer: int, width: int) -> None:
    assert config.downstream is not None
    sae, point = read_sae(config.downstream.sae), downstream_point(config)
    assert point is not None
    if (parse_hook_point(point).layer or 0) <= layer:
        raise ConfigError(f"downstream: `{point}` does not lie after layer {layer}, where the vector is added")
    if sae.width != width:
        raise ConfigError(f"downstream: the SAE reads rows of width {sae.width}, and the model's have {width}")
    if outside := [i for i in config.downstream.features if not 0 <= i < sae.latents]:
        raise ConfigError(f"downstream: the SAE has features 0 to {sae.latents - 1}, and no {outside[0]}")


def _reread(config: SteerDecayConfig, runs: Runs) -> list[Request]:
    """What each arm wrote by itself, up to the end of its window, as a prompt without steering."""
    found = []
    for i, r in enumerate(runs[FREE].requests().itertuples()):
        ids = [*r.prompt_ids.tolist(), *r.output_ids.tolist()]
        spans = (SegmentSpan("prompt", 0, len(ids)),)
        found.append(Request(i, asked_rid(r.rid), tuple(ids), spans, r.family, dict(_ONE)))
    return found


def _texts(prepared: Prepared, config: SteerDecayConfig) -> list[Request]:
    """Requests whose prompt is long enough to be cut."""
    length = config.prompt_tokens + config.steps + 1
    texts = [r for r in prepared.workload.requests if len(r.prompt_ids) >= length]
    if len(texts) < 2:
        raise WorkloadError(
            f"{len(texts)} texts of {len(prepared.workload.requests)} have {length} tokens",
            fix="longer texts (`chars`), fewer `prompt_tokens`, or earlier `onsets`",
        )
    return texts


def _decoded(texts: Sequence[Request], config: SteerDecayConfig) -> list[Request]:
    """The model's own continuation. One token more is decoded than steps are measured: the last one never runs through
    the model."""
    params = {**config.sampling, "max_new_tokens": config.steps + 1, "ignore_eos": True}
    return [_request(i, r, r.rid, config, params) for i, r in enumerate(texts)]


def _forced(texts: Sequence[Request], config: SteerDecayConfig, runs: Runs) -> list[Request]:
    outputs = {r.rid: tuple(r.output_ids.tolist()) for r in runs[DECODED].requests().itertuples()}
    return list(_steered(texts, config, FORCED, outputs))


def _steered(
    texts: Sequence[Request], config: SteerDecayConfig, kind: str, outputs: Mapping[str, tuple[int, ...]]
) -> Iterator[Request]:
    """A request for every text, source, arm and onset, no longer than what is measured of it."""
    number = 0
    for r in texts:
        start = config.prompt_tokens
        human = r.prompt_ids[start : start + config.steps + 1]
        for source in SOURCES if kind == FORCED else ("own",):
            whole = [(PLAIN, 0), (NOTHING, config.onsets[0])] if kind == FORCED else [(PLAIN, 0)]
            for arm, onset in (*whole, *((v, s) for v in (config.vector, *config.random) for s in config.onsets)):
                steps = config.steps if arm in (PLAIN, NOTHING) else onset + config.window + config.after - 1
                params = {"max_new_tokens": steps + 1, "ignore_eos": True}
                if kind == FORCED:
                    tokens = outputs[r.rid] if source == "own" else human
                    params = Ask(force=tokens[: steps + 1]).into({**params, "temperature": 0.0})
                else:
                    params = {**config.sampling, **params}
                if arm != PLAIN:
                    dose = (
                        config.dose(config.vector, onset, strength=0.0) if arm == NOTHING else config.dose(arm, onset)
                    )
                    params = Ask(steer=(dose,)).into(params)
                yield _request(number, r, rid_of(r.rid, source, arm, onset), config, params)
                number += 1


def _request(index: int, text: Request, rid: str, config: SteerDecayConfig, params: Mapping[str, object]) -> Request:
    prompt, end = text.prompt_ids[: config.prompt_tokens], config.prompt_tokens
    family = text.family or text.rid
    return Request(
        index, rid, tuple(prompt), (SegmentSpan("prompt", 0, end),), family, dict(params), source=text.source
    )
