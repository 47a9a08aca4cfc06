"""SGLang 0.5.21: the tree and the answers of 0.5.23; commands and the reading of requests of 0.5.17; the residual of
either, by model. Its own are the publication (`cache_unfinished_req`, `insert_req`) and the match (`match_prefix`)."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

from sglang_probe.engine.releases import release_0_5_17, release_0_5_23
from sglang_probe.engine.releases.base import Hook

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"

_TWO_TERMS = release_0_5_17.Adapter()
"""Layers of Llama, Qwen 2 and Mixtral return both terms of the residual; others keep a stream."""


class Adapter(release_0_5_23.Adapter):
    """See `Release`."""

    version = "0.5.21"
    trees = "the radix tree of full attention"  # the platform has no KV pool for sliding windows here
    latent = False  # not attacked
    cpu_platform = "sglang_probe.engine.platform.cpu_0_5_17.ReferenceCpuPlatform"
    cpu_attention: ClassVar[tuple[str, ...]] = ("torch_native",)  # Triton kernels write the slots of any other
    cpu_widens = False  # no `post_load_model`
    cpu_ranks = False  # not tried
    overshoots_at_length = True  # no `Scheduler._reqs_finishing_inflight`
    refused = MappingProxyType(
        {
            **release_0_5_23.Adapter.refused,
            # `managers/schedule_policy.py`, `_lock_node` calls `dec_lock_ref` without `params`, which a tree that is
            # switched off asks for: the scheduler ends.
            "disable_radix_cache": (False, "a radix cache that is switched off, as `cache: off` does"),
        }
    )
    not_shown = frozenset(
        ("accelerator rows", "attention rows", "bypass", "eviction", "positions", "steering", "telemetry", "traces")
    )
    residual_of: ClassVar[frozenset[str]] = frozenset()
    shown_points: ClassVar[frozenset[str] | None] = frozenset(("hook_embed",))

    def publication_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks import tree as lineage

        return [
            (f"{_TREE}.cache_unfinished_req", republication, "AROUND"),
            (f"{_TREE}.insert_req", lineage.publication, "AROUND"),
            (f"{_TREE}.insert", lineage.insert_asked, "AROUND"),
            (f"{_TREE}.reset", lineage.reset, "AFTER"),
            (f"{_TREE}._evict", lineage.evict, "AFTER"),
            (f"{_TREE}.match_prefix", matched, "AFTER"),
        ]

    def is_handled_tree(self, tree: Any) -> bool:
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        return type(tree) is UnifiedRadixCache and set(getattr(tree, "components", ())) == {ComponentType.FULL}

    def residual(self, forward_batch: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return _TWO_TERMS.residual(forward_batch, output)
        return super().residual(forward_batch, output)

    def changeable_residual(self, forward_batch: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return _TWO_TERMS.changeable_residual(forward_batch, output)
        return super().changeable_residual(forward_batch, output)

    def bypass_hooks(self) -> list[Hook]:
        return [(f"{_TREE}.match_prefix", match_prefix, "AROUND")]

    def request_hooks(self) -> list[Hook]:
        return [(f"{_SCHEDULER}.init_req_max_new_tokens", release_0_5_17.init_req_max_new_tokens, "AFTER")]

    def control_hooks(self) -> list[Hook]:
        return [
            (f"{_SCHEDULER}.set_internal_state", release_0_5_17.set_internal_state, "AROUND"),
            ("sglang.srt.mem_cache.common.maybe_cache_unfinished_req", keep_chunks, "AFTER"),
        ]

    def live_hooks(self) -> list[Hook]:
        from sglang_probe.engine.hooks.instruments import live

        return [
            (f"{_SCHEDULER}.get_output_streamer_class", release_0_5_23.output_streamer_class, "AFTER"),
            (f"{_SCHEDULER}.get_internal_state", live.get_internal_state, "AFTER"),
        ]


_publishing = False
"""Whether a request is being published: the tree is then asked, under the request's name, for what it has just taken.
Set and read on the scheduler's thread."""


def republication(original: Callable[..., Any], tree: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `UnifiedRadixCache.cache_unfinished_req`: as `tree.publication`; the match at its end is none of the
    request's prefix."""
    from sglang_probe.engine.hooks import tree as lineage

    global _publishing
    _publishing = True
    try:
        return lineage.publication(original, tree, req, *args, **kwargs)
    finally:
        _publishing = False


def matched(result: Any, tree: Any, params: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `UnifiedRadixCache.match_prefix`: the scheduler asked for a request's prefix."""
    from sglang_probe.engine.hooks import tree as lineage

    if params.req is not None and not _publishing:
        lineage.match(result, params.req, tree, max_prefix_len=params.key.limit)


def match_prefix(original: Callable[..., Any], tree: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `UnifiedRadixCache.match_prefix`: no more than the request may read."""
    from sglang_probe.engine.hooks import requests

    if params.req is not None and not _publishing:
        limits = [n for n in (requests.read_limit(params.req), params.key.limit) if n is not None]
        params.key.limit = min(limits, default=None)
    return original(tree, params, *args, **kwargs)


def keep_chunks(_result: None, req: Any, tree: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `maybe_cache_unfinished_req`: a chunk that was not published still counts as done, as on 0.5.17. A tree
    that is switched off says so itself here."""
    if req.skip_radix_cache_insert:
        row = tree.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : req.extend_range.end]
        req.prefix_indices = row.long().clone()
