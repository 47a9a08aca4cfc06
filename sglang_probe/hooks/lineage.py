"""What the radix tree takes and gives back, for the lineage.

SGLang: `mem_cache/unified_radix_cache.py`. `checkpoint_into_tree` inserts a request's entries once, and then a second
time only to split the leaf at the end of the prompt; the first insertion says what the tree had already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_probe.errors import UnsupportedError
from sglang_probe.hooks import live as live_server
from sglang_probe.hooks import session as probe
from sglang_probe.ledger.recorder import Context


def refuse_other_trees(tree: Any) -> None:
    """Refuse every cache but SGLang's radix tree of full attention: sliding windows and recurrent states live in
    components of their own, whose entries can be dropped while the prefix stays matched.

    Raises:
        UnsupportedError: names the cache and its components.
    """
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    components = set(getattr(tree, "components", ()))
    if type(tree) is not UnifiedRadixCache or components != {ComponentType.FULL}:
        named = ", ".join(sorted(str(getattr(c, "value", c)) for c in components)) or "none"
        raise UnsupportedError(
            f"the accounting is proved for the radix tree of full attention only; this model's cache is "
            f"{type(tree).__name__} with components: {named} (sliding-window, mamba or hybrid attention)",
            fix="use a model whose layers all have full attention, or run without the probe",
        )


def checkpoint_into_tree(original: Callable[..., Any], tree: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `UnifiedRadixCache.checkpoint_into_tree`: whose entries the next insertion publishes."""
    _publishing(req)
    try:
        return original(tree, req, *args, **kwargs)
    finally:
        _publishing(None)


def insert(result: Any, _tree: Any, params: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `UnifiedRadixCache.insert`: what was new to the tree, and what the request now shares."""
    _published(result, params)


def reset(_result: None, _tree: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `UnifiedRadixCache.reset`: the tree is empty."""
    _forget()


@probe.guarded
def _publishing(req: Any) -> None:
    probe.active().publishing = req


@probe.guarded
def _published(result: Any, params: Any) -> None:
    session = probe.active()
    req, session.publishing = session.publishing, None
    if req is None or session.recorder is None:
        return
    key = params.key
    session.recorder.publish(
        live_server.name_of(req.rid),
        req.retraction_count,
        Context(key.raw_token_ids(), (key.extra_key, key.cache_salt)),
        length=len(key),
        first_new=result.prefix_len,
        protected=params.prev_prefix_len,
    )


@probe.guarded
def _forget() -> None:
    recorder = probe.active().recorder
    if recorder is not None and recorder.lineage is not None:
        recorder.lineage.forget_tree()
