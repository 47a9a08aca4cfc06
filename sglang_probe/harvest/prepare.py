"""Everything about a harvest that can be checked before an engine starts and before anything is written."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sglang_probe.ask import WHERE, Ask
from sglang_probe.engine.hooks import inventory
from sglang_probe.engine.hooks.certified import cite, kinds_needed, subject_installed
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import require
from sglang_probe.engine.hooks.supported import refuse_unsupported
from sglang_probe.engine.platform.environment import accelerator_present, choose_cpu
from sglang_probe.engine.platform.limits import refuse_without_gpu
from sglang_probe.engine.releases import release
from sglang_probe.errors import ConfigError, ProbeError, WorkloadError
from sglang_probe.harvest.config import Recording
from sglang_probe.harvest.engine import (
    default_server_args,
    server_argument_choices,
    server_argument_names,
)
from sglang_probe.harvest.kept import check_key
from sglang_probe.harvest.model import Model, resolve_model
from sglang_probe.harvest.on_ray import require_ray
from sglang_probe.harvest.pool import Pool
from sglang_probe.harvest.sampling import SamplingCheck, check_names
from sglang_probe.harvest.steer import check_arms, check_steer, open_library
from sglang_probe.policy.arm import Arm
from sglang_probe.run import certificate
from sglang_probe.run.hook_points import (
    check_hook_points,
    check_rows_of,
    check_sliding_window,
    check_tensor_parallel,
    head_counts,
    score_points,
)
from sglang_probe.run.selection import check_selection, expanded, selected_heads
from sglang_probe.run.telemetry_options import check_lists, layers_of
from sglang_probe.run.weights import weight_hash
from sglang_probe.steering.library import Library, Vector
from sglang_probe.steering.scores import vectors_of
from sglang_probe.workload.build import Workload, WorkloadConfig, build_requests, check_fits, new_tokens
from sglang_probe.workload.request import Request
from sglang_probe.workload.sources import because

_SET_BY_US = {"model_path", "dtype", "disable_radix_cache"}


@dataclass(frozen=True)
class Prepared:
    """A checked configuration. Nothing in it changes: what one run of it serves and captures is its
    `sglang_probe.harvest.experiment.RunSpec`."""

    config: Recording
    inventory: inventory.Inventory
    model: Model
    workload: Workload
    """The requests of the configuration's workload, of which those of a run are made."""
    room: int
    """Positions that a request may have."""
    context: int
    """Positions that the model is served with. `room` may be less: the KV pool bounds it too."""
    sampling: SamplingCheck
    """Has passed the sampling values of the workload."""
    pool: Pool
    """How large the KV pool is, where the user left it open."""
    library: Library | None = None
    """The vectors that requests and arms may name."""
    proving: bool = False
    """Whether what is recorded is a proof."""


@dataclass(frozen=True)
class Capture:
    """What the rows of a run are, beyond the names of its hook points."""

    heads: dict[str, list[int]]
    """Kept heads and their width at hook points whose rows are per head."""
    head_numbers: dict[str, list[int]]
    """Which heads these are, where it is not all of them."""
    telemetry_layers: list[int]
    scores: dict[str, list[Vector]] = field(default_factory=dict)
    """Vectors of hook points whose rows are scores."""
    scores_library: str = ""
    """Hash of their library."""


def prepare(
    config: Recording,
    arms: Mapping[str, Arm] = MappingProxyType({}),
    *,
    workload: WorkloadConfig | Workload | None = None,
    kept_later: bool = False,
    proving: bool = False,
) -> Prepared:
    """Check a configuration.

    Args:
        arms: all that will be recorded with it.
        workload: in place of the configuration's own.
        kept_later: lines of the workload may name kept sets, which a run of it will bring.
        proving: this is the proof, so that no certificate is asked.

    Raises:
        ProbeError: a child of it for every kind of bad input.
    """
    asked = EngineProbeConfig(
        run=config.output,
        hook_points=config.hook_points,
        scores=config.scores,
        simulated_graphs=config.simulated_graphs,
        telemetry=config.telemetry,
        asks=["force"] if config.steer is None else ["force", "steer"],
        steer=config.steer,
    )
    reviewed = require(asked, "platform")
    servers = [dict(config.server), *({**config.server, **arm.server} for arm in arms.values())]
    choose_device(servers)
    if config.replicas > 1:
        _check_replicas(config.replicas, arms, servers)
    for server in servers:
        _check_server(server)
    for arm in arms.values():
        refuse_unsupported({"disable_radix_cache": arm.cache == "off"})
        if not accelerator_present():
            refuse_without_gpu(server)
    model = resolve_model(config.model)
    rows, points = expanded(config.rows, config.hook_points, model.layers)
    config = config.model_copy(update={"rows": rows, "hook_points": points})
    capture_of(config, model, config.hook_points, servers)
    if not proving:
        for server in servers:
            require_certificate(config, model, server)
    library = open_library(config.steer, model)
    check_arms(arms, library)
    merged = [{**default_server_args(), **server} for server in servers]
    context = min([model.context_length, *(int(m["context_length"]) for m in merged if m.get("context_length"))])
    # A request must fit into the KV pool as well as into the context.
    room = min([context, *(int(m["max_total_tokens"]) for m in merged if m.get("max_total_tokens"))])
    sampling = SamplingCheck(model, config.server)
    given = getattr(config, "workload", None) if workload is None else workload
    if not isinstance(given, Workload):
        if given is None:
            raise ConfigError("there is no workload", fix="give `workload`, or requests")

        def check(request: Request) -> None:
            check_request(request, config, sampling, context=context, library=library)
            if not kept_later:
                with because("kept set"):
                    check_key(request, None, model)

        # Once for all requests, so that what the YAML says is not taken for a fault of the first one.
        check_sampling(config.sampling, sampling, library)
        given = build_requests(
            given,
            model.tokenizer,
            context_length=room,
            default_sampling=dict(config.sampling),
            check=check,
        )
    # Last, because SGLang must be imported to know its names.
    for server in servers:
        check_names(server, server_argument_names(), "server argument")
        _check_choices(server, server_argument_choices())
    for dtype in {config.dtype, *(arm.dtype for arm in arms.values() if arm.dtype)}:
        _check_choices({"dtype": dtype}, server_argument_choices())
    together = max([config.concurrency, *(arm.partners.count + 1 for arm in arms.values() if arm.partners)])
    pool = Pool(together, max(int(server.get("page_size") or 1) for server in servers))
    pool = replace(pool, least=pool.tokens(given.requests))
    prepared = Prepared(config, reviewed, model, given, room, context, sampling, pool, library, proving)
    if given is workload:  # its requests were made elsewhere
        check_requests(given.requests, prepared)
    return prepared


def require_certificate(config: Recording, model: Model, server: Mapping[str, Any], *, evict: bool = False) -> None:
    """Refuse rows, telemetry and interventions on an accelerator that nothing proves, as far as that can be told before
    the engine starts. The engine asks again, and then knows what SGLang chose.

    Args:
        evict: requests may name kept sets.

    Raises:
        UnsupportedError: names the command that proves them.
    """
    of_config = {"telemetry": config.telemetry is not None, "steer": config.steer is not None}
    kinds = kinds_needed(config.hook_points, **of_config, evict=evict)
    if not kinds or not accelerator_present():
        return
    subject = subject_installed() | certificate.model_facts(Path(model.path))
    subject |= {"weights_sha256": model.identity["weights_sha256"], "tp_size": int(server.get("tp_size") or 1)}
    if (backend := server.get("attention_backend")) is not None:
        subject["attention_backend"] = backend
    given = {**server, **({} if config.dtype == "auto" else {"dtype": config.dtype})}
    cite(config.certificate, subject, kinds, model.name, given)


def choose_device(servers: Sequence[Mapping[str, Any]]) -> None:
    """Leave the accelerator of this machine alone, from here on and in this process's children, if `device: cpu` says
    so.

    Raises:
        ConfigError: some arms are to run on the CPU and others not: SGLang decides once in a process.
    """
    on_cpu = [server.get("device") == "cpu" for server in servers]
    if not any(on_cpu):
        return
    if not all(on_cpu) and accelerator_present():
        raise ConfigError("some arms set `device: cpu` and others do not", fix="set it under `server:`, for all arms")
    if accelerator_present():
        choose_cpu(os.environ)


def require_asks(asks: Collection[str]) -> None:
    """Refuse fields of `Ask` that the installed SGLang was not reviewed for.

    Raises:
        InventoryError: names what is missing.
    """
    require(EngineProbeConfig(run=Path(), asks=sorted(asks)))


def capture_of(
    config: Recording, model: Model, hook_points: Sequence[str], servers: Iterable[Mapping[str, Any]]
) -> Capture:
    """What capturing `hook_points` gives.

    Args:
        servers: the server arguments of every engine that captures them.

    Raises:
        ConfigError, UnsupportedError: they cannot be captured.
    """
    layers = [] if config.telemetry is None else layers_of(config.telemetry, model.layers)
    if config.telemetry is not None:
        check_lists(config.telemetry, in_graphs=config.simulated_graphs or accelerator_present())
    if not hook_points and config.telemetry is None:
        return Capture({}, {}, layers)
    check_hook_points(list(hook_points), model.layers)
    check_selection(config.rows, hook_points)
    telemetry = config.telemetry is not None
    check_rows_of(model.architecture, hook_points, release().residual_of, telemetry=telemetry)
    counts = head_counts(hook_points, heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim)
    for server in servers:
        longest = int(server.get("context_length") or model.context_length)
        check_sliding_window(model.config, longest, model.architecture)
        check_tensor_parallel(hook_points, int(server.get("tp_size", 1)), telemetry=telemetry)
    scores: dict[str, list[Vector]] = {}
    library = ""
    if score_points(hook_points):
        digest = weight_hash(model.identity["weights_sha256"])
        width = int(model.config["hidden_size"])
        scores, library = vectors_of(config.scores, hook_points, width=width, layers=model.layers, weight_hash=digest)
    return Capture(*selected_heads(config.rows, counts), layers, scores, library)


def check_ask(request: Request, config: Recording, *, context: int, vocabulary: int, library: Library | None) -> None:
    """Refuse what a request cannot ask of the probe.

    Raises:
        ConfigError: names the key.
    """
    ask = request.ask
    if ask.provenance is not None:
        raise ConfigError(f"`{WHERE}.provenance`: a live server answers it; a run has the origin of every position")
    if ask.system is not None and config.telemetry is None:
        raise ConfigError(f"`{WHERE}.system`: nothing reads it without `telemetry`")
    check_steer(ask.steer, library)
    ask.check(
        prompt_len=len(request.prompt_ids),
        new_tokens=new_tokens(request.sampling_params),
        context=context,
        vocabulary=vocabulary,
    )


def check_request(
    request: Request, config: Recording, sampling: SamplingCheck, *, context: int, library: Library | None = None
) -> None:
    """Refuse a request whose tokens, sampling values or asks cannot be served.

    Raises:
        ProbeError: names what; `reason` is its class.
    """
    vocabulary = sampling.model.vocabulary
    with because("token ids"):
        _check_tokens(request.prompt_ids, vocabulary)
    with because("sampling value"):
        sampling(request.sampling_params)
    with because("ask", whatever=True):
        check_ask(request, config, context=context, vocabulary=vocabulary, library=library)


def check_sampling(given: Mapping[str, Any], check: SamplingCheck, library: Library | None = None) -> None:
    """Refuse default sampling parameters that SGLang refuses.

    Raises:
        ConfigError, UnsupportedError: names the parameter and the value.
    """
    try:
        check(given)
        check_steer(Ask.of(given).steer, library)
    except ProbeError as e:
        raise e.at("`sampling`") from e


def check_requests(requests: Sequence[Request], prepared: Prepared) -> None:
    """Refuse requests that cannot be served.

    Raises:
        ProbeError: names the request, and file and line if it was read from one.
    """
    for r in requests:
        try:
            check_fits(len(r.prompt_ids), r.sampling_params, prepared.room)
            check_request(r, prepared.config, prepared.sampling, context=prepared.context, library=prepared.library)
        except ProbeError as e:
            raise e.at(r.where) from e


def _check_tokens(prompt_ids: Sequence[int], vocabulary: int) -> None:
    if not prompt_ids:
        raise WorkloadError("the prompt is empty", fix="give it at least one token")
    if (outside := next((t for t in prompt_ids if not 0 <= t < vocabulary), None)) is not None:
        raise WorkloadError(f"token {outside} is not within the vocabulary of {vocabulary}")


def _check_server(server: dict[str, object]) -> None:
    refuse_unsupported(server)
    if taken := _SET_BY_US & set(server):
        raise ConfigError(
            f"server argument `{min(taken)}` is set by the probe", fix="use `model`, `dtype` and the arm's `cache`"
        )


def _check_replicas(replicas: int, arms: Mapping[str, Arm], servers: Iterable[Mapping[str, Any]]) -> None:
    """Refuse what several engines cannot do together.

    Raises:
        ConfigError: names the key. UnsupportedError: Ray is not installed.
    """
    require_ray()
    if name := next((name for name, arm in arms.items() if arm.partners is not None), None):
        raise ConfigError(
            f"arm `{name}` says who shares a batch, and {replicas} engines have batches of their own",
            fix="leave out `replicas`",
        )
    if any(int(server.get("dp_size") or 1) > 1 for server in servers):
        raise ConfigError(
            "`dp_size` gives requests to its ranks in turn, and `replicas` keep those together that begin alike",
            fix="leave out `server: {dp_size: ...}`",
        )


def _check_choices(given: Mapping[str, object], choices: Mapping[str, list[object]]) -> None:
    for name, value in given.items():
        if value is not None and value not in choices.get(name, [value]):
            raise ConfigError(
                f"server argument `{name}: {value}` is not among SGLang's choices",
                fix=", ".join(map(str, choices[name])),
            )
