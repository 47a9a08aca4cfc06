"""SGLang 0.5.23: `UnifiedRadixCache`, published by `checkpoint_into_tree`; `match_kv_cache`; a residual stream object;
a class for the output streamer; a controller for the internal state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

from sglang_probe.engine.releases.base import Hook, Release
from sglang_probe.errors import UnsupportedError

logger = logging.getLogger("sglang_probe")

_SCHEDULER = "sglang.srt.managers.scheduler"
_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_CONTROLLER = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"


class Adapter(Release):
    """See `Release`."""

    version = "0.5.23"
    tree = _TREE
    trees = "the radix tree of full attention, alone or with sliding windows,"
    latent = True
    cpu_platform = "sglang_probe.engine.platform.cpu.ReferenceCpuPlatform"
    cpu_attention: ClassVar[tuple[str, ...]] = ("probe_torch", "torch_native")
    cpu_widens = True
    cpu_ranks = True
    row_channel = "sglang.srt.managers.auxiliary_output"
    overshoots_at_length = False  # `Scheduler._reqs_finishing_inflight`
    namespace_fields = ("extra_key", "cache_salt")
    residual_of: ClassVar[frozenset[str]] = frozenset(("DeepseekV3ForCausalLM", "MellumForCausalLM"))
    refused = MappingProxyType({"enable_unified_cache_external_linker": (False, "an external KV store")})

    def publication_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks import tree as lineage

        return [
            (f"{_TREE}.checkpoint_into_tree", lineage.publication, "AROUND"),
            (f"{_TREE}.insert", lineage.insert_asked, "AROUND"),
            (f"{_TREE}.reset", lineage.reset, "AFTER"),
            (f"{_TREE}._evict", lineage.evict, "AFTER"),
            ("sglang.srt.mem_cache.common.match_kv_cache", lineage.match, "AFTER"),
        ]

    def is_handled_tree(self, tree: Any) -> bool:
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        components = set(getattr(tree, "components", ()))
        handled = ({ComponentType.FULL}, {ComponentType.FULL, ComponentType.SWA})
        return type(tree) is UnifiedRadixCache and components in handled

    def taken(self, result: Any) -> list[tuple[int, int]]:
        from sglang.srt.mem_cache.unified_cache.components import ComponentType

        if not result.adopted_ranges:
            return []
        new = result.prefix_len
        ranges = result.adopted_ranges.get(ComponentType.FULL, ())
        return [(start, min(end, new)) for start, end in sorted(ranges) if start < new]

    def protected_len(self, params: Any, req: Any) -> int:
        return int(params.prev_prefix_len)

    def bypass_hooks(self) -> list[Hook]:
        return [("sglang.srt.mem_cache.common.match_kv_cache", match_kv_cache, "AROUND")]

    def request_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks import requests

        return [(f"{_SCHEDULER}.Scheduler._create_generation_req", requests.made, "AFTER")]

    def abort_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks import scheduler as accounting

        return [(f"{_SCHEDULER}._make_abort_req", accounting.make_abort_req, "AFTER")]

    def committed_len(self, req: Any) -> int:
        return int(req.kv.kv_committed_len)

    def in_beam(self, req: Any) -> bool:
        return req.beam_group is not None

    def dp_rank(self, scheduler: Any) -> int:
        from sglang.srt.runtime_context import get_parallel

        return get_parallel().dp_rank or 0

    def residual(self, forward_batch: Any, output: Any) -> Any:
        # DeepSeek's layers return, beside it, which entries later layers attend to (none without sparse attention).
        hidden = output[0] if isinstance(output, tuple) else output
        return forward_batch.residual_stream.snapshot(hidden)

    def changeable_residual(self, forward_batch: Any, output: Any) -> Any:
        stream = forward_batch.residual_stream
        stream.check(output)
        if stream.residual is None:
            raise UnsupportedError("the layer keeps its residual stream in no tensor of its own")
        return stream.residual

    def row_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks.instruments import accelerator

        worker = "sglang.srt.managers.tp_worker.TpModelWorker"
        return [(f"{worker}.forward_batch_generation", accelerator.forward_batch_generation, "AROUND")]

    def refusal_hooks(self) -> list[Hook]:
        return [("sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init", refuse_beams, "AROUND")]

    def weight_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks import weights

        return [
            *weights.hooks(
                {
                    "update_weights_from_disk": weights.update_from_disk,
                    "update_weights_from_distributed": weights.update_from_distributed,
                    "update_weights_from_tensor": weights.update_from_tensor,
                    "update_weights_from_ipc": weights.update_from_ipc,
                    "begin_weight_update": weights.begin_session,
                    "end_weight_update": weights.end_session,
                    "resume_memory_occupation": weights.resume_memory,
                }
            ),
            (f"{_SCHEDULER}.Scheduler.handle_update_weight_version", weights.renamed, "AFTER"),
        ]

    def weight_version(self, server_args: Any) -> str:
        from sglang.srt.runtime_context import get_serving

        return str(get_serving().weight_version)

    def weight_version_after(self, request: Any) -> str | None:
        return self.weight_version(None)

    def control_hooks(self) -> list[Hook]:
        return [(f"{_CONTROLLER}._update_handlers", update_handlers, "AFTER")]

    def live_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks.instruments import live

        return [
            (f"{_SCHEDULER}.Scheduler.get_output_streamer_class", output_streamer_class, "AFTER"),
            (f"{_CONTROLLER}.get_internal_state", live.get_internal_state, "AFTER"),
        ]

    def trace_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks.instruments import traces

        kinds = ("trace.TraceReqContext", "trace_async.TraceReqContextAsync")
        return [(f"sglang.srt.observability.{kind}.abort", traces.span_ends, "BEFORE") for kind in kinds]

    def argument_names(self, server_args: type[Any]) -> set[str]:
        return set(server_args.__struct_fields__)

    def arguments_in_force(self, server_args: Any) -> dict[str, Any]:
        from sglang.srt.runtime_context import get_context

        return dict(get_context().resolved_server_args_dict())


def refuse_beams(original: Callable[..., Any], coordinator: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `BeamCoordinator.validate_and_init`, whose message SGLang answers with status 400."""
    from sglang_probe.engine.hooks import requests

    return requests.beams_refused() or original(coordinator, req, *args, **kwargs)


def match_kv_cache(original: Callable[..., Any], req: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `match_kv_cache`: no more than the request may read."""
    from sglang_probe.engine.hooks import requests

    limits = [n for n in (requests.read_limit(req), kwargs.get("max_prefix_len")) if n is not None]
    if limits:
        kwargs["max_prefix_len"] = min(limits)
    return original(req, *args, **kwargs)


def update_handlers(handlers: dict[str, Any], _controller: Any) -> dict[str, Any]:
    """AFTER `SchedulerInternalStateController._update_handlers`: add the probe's keys."""
    from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected, _UpdateHandler

    from sglang_probe.engine.hooks import control

    # Validation may refuse; `apply` may not. So the work is done here, and a failure is a refusal.
    def validate(key: str, value: Any) -> None:
        try:
            control.carry_out(key, value)
        except control.Refused as e:
            raise UpdateRejected(f"{key}: {e}") from e

    for key in control.KEYS:
        handlers[key] = _UpdateHandler(validate, lambda _key, _value: None)
    return handlers


def output_streamer_class(streamer: type[Any], scheduler: Any) -> type[Any] | None:
    """AFTER `Scheduler.get_output_streamer_class`: a subclass that adds provenance to `meta_info`."""
    from sglang_probe.engine.hooks.instruments import live

    if getattr(scheduler, "rust_server", None) is not None:
        logger.warning("sglang-probe: no provenance in meta_info behind SGLang's Rust server")
        return None
    base: Any = streamer

    class ProvenanceStreamer(base):  # type: ignore[misc]
        has_additional_customized_info = True

        def should_build_additional_customized_info(self) -> bool:
            return live.anybody_asks() or (
                base.has_additional_customized_info and super().should_build_additional_customized_info()
            )

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            info: dict[str, list[Any]] = super().build_additional_customized_info(reqs)
            spans = live.provenance_of(reqs)
            return info if spans is None else {**info, live.META_KEY: spans}

        def is_request_level_customized_info_key(self, key: str) -> bool:
            return key == live.META_KEY or bool(super().is_request_level_customized_info_key(key))

    return ProvenanceStreamer
