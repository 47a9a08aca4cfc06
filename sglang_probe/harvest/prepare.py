"""Everything about a harvest that can be checked before an engine starts and before anything is written."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from sglang_probe.engine.hooks import inventory
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import features
from sglang_probe.engine.hooks.supported import refuse_unsupported
from sglang_probe.engine.platform.environment import accelerator_present
from sglang_probe.engine.platform.limits import refuse_without_gpu
from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.harvest.config import Recording
from sglang_probe.harvest.engine import (
    default_server_args,
    sampling_parameter_names,
    server_argument_choices,
    server_argument_names,
)
from sglang_probe.harvest.model import resolve_model
from sglang_probe.policy.arm import Arm
from sglang_probe.run.hook_points import (
    check_architecture,
    check_hook_points,
    check_sliding_window,
    check_tensor_parallel,
    head_counts,
)
from sglang_probe.run.selection import check_selection, selected_heads
from sglang_probe.run.telemetry_options import layers_of
from sglang_probe.workload.build import build_requests
from sglang_probe.workload.request import Request

_SET_BY_US = {"model_path", "dtype", "disable_radix_cache"}


class Prepared:
    """A checked configuration: the inventory, the model, and the requests.

    Raises (on construction):
        ProbeError: a child of it for every kind of bad input.
    """

    def __init__(self, config: Recording, arms: Mapping[str, Arm]) -> None:
        self.config = config
        asked = EngineProbeConfig(
            run=config.output,
            hook_points=config.hook_points,
            accelerator=config.accelerator,
            telemetry=config.telemetry,
            asks=["force"],
        )
        self.inventory = inventory.require([*features(asked), "platform"])
        servers = [dict(config.server), *(dict(arm.server) for arm in arms.values())]
        for server in servers:
            _check_server(server)
            if not accelerator_present():
                refuse_without_gpu(server)
        self.model = resolve_model(config.model)
        self.heads: dict[str, list[int]] = {}
        """Kept heads and their width at hook points whose rows are per head."""
        self.head_numbers: dict[str, list[int]] = {}
        """Which heads these are, where it is not all of them."""
        self.telemetry_layers: list[int] = []
        if config.telemetry is not None:
            self.telemetry_layers = layers_of(config.telemetry, self.model.layers)
        if config.hook_points or config.telemetry is not None:
            check_hook_points(config.hook_points, self.model.layers)
            check_selection(config.rows, config.hook_points)
            check_architecture(self.model.architecture)
            self.heads, self.head_numbers = selected_heads(
                config.rows,
                head_counts(
                    config.hook_points,
                    heads=self.model.heads,
                    kv_heads=self.model.kv_heads,
                    head_dim=self.model.head_dim,
                ),
            )
            for server in servers:
                context = {**config.server, **server}.get("context_length") or self.model.context_length
                check_sliding_window(self.model.config, int(context))
                tp_size = int({**config.server, **server}.get("tp_size", 1))
                check_tensor_parallel(config.hook_points, tp_size, telemetry=config.telemetry is not None)
            if accelerator_present() and config.accelerator != "unproved":
                raise UnsupportedError(
                    "capturing rows on an accelerator has been shown on one model of GPU only (docs/gpu-results.md)",
                    fix="set `accelerator: unproved` to try it and check what you get (docs/gpu.md), "
                    "`hook_points: []` to record the ledger alone, or use a machine without an accelerator",
                )
        self.workload_source = config.workload.model_dump(mode="json")
        room = [self.model.context_length]
        for server in servers:
            merged = {**default_server_args(), **config.server, **server}
            # A request must fit into the KV pool as well as into the context.
            room += [int(merged[k]) for k in ("context_length", "max_total_tokens") if merged.get(k)]
        self.room = min(room)
        """Positions that a request may have."""
        self.workload = build_requests(
            config.workload, self.model.tokenizer, context_length=self.room, default_sampling=dict(config.sampling)
        )
        # Last, because SGLang must be imported to know its names.
        for server in servers:
            _check_names(server, server_argument_names(), "server argument")
            _check_choices(server, server_argument_choices())
        for dtype in {config.dtype, *(arm.dtype for arm in arms.values() if arm.dtype)}:
            _check_choices({"dtype": dtype}, server_argument_choices())
        check_sampling(self.workload.requests)


def _check_server(server: dict[str, object]) -> None:
    refuse_unsupported(server)
    if taken := _SET_BY_US & set(server):
        raise ConfigError(
            f"server argument `{min(taken)}` is set by the probe", fix="use `model`, `dtype` and the arm's `cache`"
        )


def check_sampling(requests: list[Request]) -> None:
    """Refuse sampling parameters that SGLang does not know, and those that give several outputs.

    Raises:
        ConfigError, UnsupportedError: name the request and the parameter.
    """
    known = sampling_parameter_names()
    for r in requests:
        _check_names(r.sampling_params, known, f"request {r.index}: sampling parameter")
        for name in ("n", "beam_width"):
            if r.sampling_params.get(name) not in (None, 1):
                raise UnsupportedError(
                    f"request {r.index}: `{name}: {r.sampling_params[name]}` gives several outputs for one request",
                    fix="repeat the request in the workload instead",
                )


def _check_choices(given: Mapping[str, object], choices: Mapping[str, list[object]]) -> None:
    for name, value in given.items():
        if value is not None and value not in choices.get(name, [value]):
            raise ConfigError(
                f"server argument `{name}: {value}` is not among SGLang's choices",
                fix=", ".join(map(str, choices[name])),
            )


def _check_names(given: Iterable[str], known: set[str], what: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ConfigError(f"{what} `{name}` is unknown to SGLang{hint}")
