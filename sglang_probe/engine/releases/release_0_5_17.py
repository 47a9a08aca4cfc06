"""SGLang 0.5.17: `RadixCache`, published by `cache_unfinished_req` and `cache_finished_req`, or `ChunkCache`, which
holds nothing; `match_prefix`; layers that return the two terms of the residual; answers built by an accumulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from sglang_probe.engine.releases.base import Hook, Release
from sglang_probe.errors import UnsupportedError

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_COMPONENTS = "sglang.srt.managers.scheduler_components"
_TREE = "sglang.srt.mem_cache.radix_cache.RadixCache"


class Adapter(Release):
    """See `Release`."""

    version = "0.5.17"
    tree = _TREE
    cpu_platform = "sglang_probe.engine.platform.cpu_0_5_17.ReferenceCpuPlatform"
    cpu_attention = ("torch_native",)
    cpu_widens = False  # no `post_load_model`
    cpu_ranks = False  # tensor parallelism asks for NCCL (`parallel_state.py`), data parallelism for one rank's cores
    row_channel = "sglang.srt.managers.utils"
    overshoots_at_length = True
    namespace_fields = ("extra_key",)  # OpenAI's `cache_salt` is put in front of it
    refused = MappingProxyType(
        {
            "enable_prefill_context_parallel": (False, "prefill context parallelism"),
            "enable_dsa_prefill_context_parallel": (False, "prefill context parallelism"),
        }
    )

    not_shown = frozenset(("traces",))

    def publication_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks import tree as lineage

        return [
            (f"{_TREE}.cache_unfinished_req", lineage.publication, "AROUND"),
            (f"{_TREE}.cache_finished_req", lineage.publication, "AROUND"),
            (f"{_TREE}.insert", lineage.insert, "AFTER"),
            (f"{_TREE}.reset", reset, "AFTER"),
            (f"{_TREE}.evict", lineage.evict, "AFTER"),
            (f"{_TREE}.match_prefix", matched, "AFTER"),
        ]

    def is_handled_tree(self, tree: Any) -> bool:
        from sglang.srt.mem_cache.chunk_cache import ChunkCache
        from sglang.srt.mem_cache.radix_cache import RadixCache

        return type(tree) in (RadixCache, ChunkCache)

    def protected_len(self, params: Any, req: Any) -> int:
        return int(req.cache_protected_len)

    def bypass_hooks(self) -> list[Hook]:
        return [(f"{_TREE}.match_prefix", match_prefix, "AROUND")]

    def request_hooks(self) -> list[Hook]:
        return [(f"{_SCHEDULER}.init_req_max_new_tokens", init_req_max_new_tokens, "AFTER")]

    def abort_hooks(self) -> list[Hook]:
        return [(f"{_COMPONENTS}.output_sender.SenderWrapper.send_output", send_output, "AFTER")]

    def committed_len(self, req: Any) -> int:
        return int(req.kv_committed_len)

    def in_beam(self, req: Any) -> bool:
        return False  # no beam search in this release

    def dp_rank(self, scheduler: Any) -> int:
        return scheduler.ps.dp_rank or 0

    def residual(self, forward_batch: Any, output: Any) -> Any:
        hidden, residual = output
        if getattr(hidden, "_sglang_needs_allreduce_fusion", False):
            raise UnsupportedError("the layer's output is one rank's share of a sum that the next layer completes")
        return hidden + residual

    def changeable_residual(self, forward_batch: Any, output: Any) -> Any:
        if output[1] is None:
            raise UnsupportedError("the layer keeps its residual stream in no tensor of its own")
        return output[1]  # which the next norm adds to the output of the layer

    def row_hooks(self) -> list[Hook]:
        worker = "sglang.srt.managers.tp_worker.TpModelWorker"
        processor = f"{_COMPONENTS}.batch_result_processor.SchedulerBatchResultProcessor"
        return [
            (f"{worker}.forward_batch_generation", forward_batch_generation, "AFTER"),
            ("sglang.srt.managers.utils.GenerationBatchResult.copy_to_cpu", copy_to_cpu, "AROUND"),
            (f"{processor}.process_batch_result_prefill", process_batch_result, "AFTER"),
            (f"{processor}.process_batch_result_decode", process_batch_result, "AFTER"),
        ]

    def refusal_hooks(self) -> list[Hook]:
        return []

    def weight_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks import weights

        return weights.hooks(
            {
                "update_weights_from_disk": weights.update_from_disk,
                "update_weights_from_distributed": weights.update_from_distributed,
                "update_weights_from_tensor": weights.update_from_tensor,
                "update_weights_from_ipc": weights.update_from_ipc,
                "resume_memory_occupation": weights.resume_memory,
            }
        )

    def weight_version(self, server_args: Any) -> str:
        return str(server_args.weight_version)

    def weight_version_after(self, request: Any) -> str | None:
        # The name is kept by the HTTP process; the scheduler hears of it with the update.
        version = getattr(request, "weight_version", None)
        return None if version is None else str(version)

    def control_hooks(self) -> list[Hook]:
        return [
            (f"{_SCHEDULER}.set_internal_state", set_internal_state, "AROUND"),
            ("sglang.srt.mem_cache.common.maybe_cache_unfinished_req", keep_chunks, "AFTER"),
        ]

    def live_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks.instruments import live

        return [
            (f"{_COMPONENTS}.output_streamer._GenerationStreamAccumulator.to_payload", to_payload, "AFTER"),
            (f"{_SCHEDULER}.get_internal_state", live.get_internal_state, "AFTER"),
        ]

    def trace_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks.instruments import traces

        return [("sglang.srt.observability.trace.TraceReqContext.abort", traces.span_ends, "BEFORE")]

    def argument_names(self, server_args: type[Any]) -> set[str]:
        return {field.name for field in dataclasses.fields(server_args)}

    def arguments_in_force(self, server_args: Any) -> dict[str, Any]:
        # Resolved in place.
        return {field.name: getattr(server_args, field.name) for field in dataclasses.fields(server_args)}


def reset(_result: None, tree: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `RadixCache.reset`: the tree is empty. The policies `lpm` and `dfs-weight` keep one more, of the prompts
    that wait, and empty it before each forward; it has no KV pool."""
    from sglang_probe.engine.hooks import tree as lineage

    if tree.token_to_kv_pool_allocator is not None:
        lineage.reset(None, tree)


def matched(result: Any, tree: Any, params: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `RadixCache.match_prefix`: the scheduler asked for a request's prefix. `lpm` asks a tree of its own, of the
    prompts that wait, too."""
    from sglang_probe.engine.hooks import tree as lineage

    if params.req is not None and tree.token_to_kv_pool_allocator is not None:
        lineage.match(result, params.req, tree, max_prefix_len=params.key.limit)


def match_prefix(original: Callable[..., Any], tree: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `RadixCache.match_prefix`: no more than the request may read. A publication looks up what it has just
    inserted without naming the request."""
    from sglang_probe.engine.hooks import requests

    if params.req is not None:
        limits = [n for n in (requests.read_limit(params.req), params.key.limit) if n is not None]
        params.key.limit = min(limits, default=None)
    return original(tree, params, *args, **kwargs)


def init_req_max_new_tokens(_result: None, scheduler: Any, req: Any) -> None:
    """AFTER `Scheduler.init_req_max_new_tokens`, which every request passes on its way to the queue, those too that
    were refused for something else."""
    from sglang_probe.engine.hooks import requests

    requests.made(req, scheduler)


def keep_chunks(_result: None, req: Any, tree: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `maybe_cache_unfinished_req`: a chunk that was not published still counts as done.

    The next chunk begins after `req.prefix_indices`, which a publication extends, and so does `ChunkCache`; SGLang
    leaves it alone for a tree that is switched off and for a request that publishes nothing, and would compute the
    same chunk for ever.
    """
    if tree.disable or req.skip_radix_cache_insert:
        row = tree.req_to_token_pool.req_to_token[req.req_pool_idx, : req.extend_range.end]
        req.prefix_indices = row.long().clone()


def send_output(_result: None, _sender: Any, output: Any, req: Any = None) -> None:
    """AFTER `SenderWrapper.send_output`: the client of a request is told that it was dropped."""
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.schedule_batch import Req

    if isinstance(output, AbortReq) and isinstance(req, Req):
        from sglang_probe.engine.hooks import scheduler as accounting

        accounting.make_abort_req(None, req)


def set_internal_state(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """AROUND `Scheduler.set_internal_state`: carry out the probe's keys, leave the others to SGLang."""
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    from sglang_probe.engine.hooks import control

    ours = {key: value for key, value in request.server_args.items() if key in control.KEYS}
    if not ours:
        return original(scheduler, request)
    try:
        for key, value in ours.items():
            control.carry_out(key, value)
    except control.Refused as e:
        control.logger.warning("sglang-probe: %s", e)
        return SetInternalStateReqOutput(updated=False)
    request.server_args = {key: value for key, value in request.server_args.items() if key not in ours}
    return original(scheduler, request) if request.server_args else SetInternalStateReqOutput(updated=True)


def to_payload(payload: Any, accumulator: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `_GenerationStreamAccumulator.to_payload`: add provenance to `meta_info`. The tokenizer process joins what
    comes under one key, and only the last output of a request brings something."""
    from sglang_probe.engine.hooks.instruments import live

    if payload is None or accumulator.rust_server_mode or not live.anybody_asks():
        return
    spans = live.provenance_by_id(payload.rids, [reason is not None for reason in payload.finished_reasons])
    if spans is not None:
        from sglang.srt.managers.io_struct import unwrap_from_pickle, wrap_as_pickle

        info = unwrap_from_pickle(payload.customized_info) or {}
        payload.customized_info = wrap_as_pickle({**info, live.META_KEY: spans})


_ROWS = "_sglang_probe_rows"
"""Attribute of a `GenerationBatchResult`: the transfers of its forward, and the event after them once sent."""


def forward_batch_generation(result: Any, worker: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `TpModelWorker.forward_batch_generation`: the result carries the rows of its forward. Without overlap
    scheduling SGLang copies nothing asynchronously, so that they are sent here, on the stream of the forward."""
    from sglang_probe.engine.hooks.instruments import accelerator

    transfers = accelerator.travelling()
    if transfers:
        setattr(result, _ROWS, (transfers, None))
        if not worker.enable_overlap:
            _send(result)


def copy_to_cpu(original: Callable[..., Any], result: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `GenerationBatchResult.copy_to_cpu`: our copies before SGLang's, on the stream that it has made
    current after the forward (its copy stream; for a delayed sample the forward's own). `copy_done` is recorded at its
    end, after both, and is waited for before the result is processed."""
    _send(result)
    return original(result, *args, **kwargs)


def _send(result: Any) -> None:
    from sglang.srt.managers.utils import _async_d2h

    from sglang_probe.engine.hooks.instruments import accelerator

    transfers, event = getattr(result, _ROWS, (None, None))
    if transfers is not None and event is None:
        setattr(result, _ROWS, (transfers, accelerator.send(transfers, _async_d2h)))


def process_batch_result(_value: Any, _processor: Any, _batch: Any, result: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER the result of a forward was processed: SGLang has waited for its copies."""
    from sglang_probe.engine.hooks.instruments import accelerator

    transfers, event = getattr(result, _ROWS, (None, None))
    if transfers is not None:
        accelerator.arrived(transfers, event)
        delattr(result, _ROWS)
