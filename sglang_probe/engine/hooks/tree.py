"""What the radix tree takes and gives back, for the lineage.

Where a release publishes is its adapter's to say (`Release.publication_hooks`). 0.5.23 inserts a request's entries
once, and then a second time only to split the leaf at the end of the prompt; the first insertion says what the tree
had already.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from sglang_probe.engine.hooks import guard, requests
from sglang_probe.engine.hooks.instruments import live as live_server
from sglang_probe.engine.ledger.facts import Context
from sglang_probe.engine.releases import release
from sglang_probe.errors import UnsupportedError
from sglang_probe.run import schema

MATCHED = "_sglang_probe_matched"
"""Attribute of a `Req`: `Matched`."""

_MISSES = os.environ.get("SGLANG_RADIX_FORCE_MISS", "").lower() in ("1", "true", "yes", "y")


def refuse_other_trees(tree: Any) -> None:
    """Refuse every cache but SGLang's radix tree of full attention: sliding windows and recurrent states live in
    components of their own, whose entries can be dropped while the prefix stays matched.

    Raises:
        UnsupportedError: names the cache and its components.
    """
    if not release().is_plain_tree(tree):
        named = ", ".join(sorted(str(getattr(c, "value", c)) for c in getattr(tree, "components", ()))) or "none"
        raise UnsupportedError(
            f"the accounting is proved for the radix tree of full attention only; this model's cache is "
            f"{type(tree).__name__} with components: {named} (sliding-window, mamba or hybrid attention)",
            fix="use a model whose layers all have full attention, or run without the probe",
        )


def publication(original: Callable[..., Any], tree: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND the tree's method that publishes a request: whose entries the next insertion takes."""
    _publishing(req)
    try:
        return original(tree, req, *args, **kwargs)
    finally:
        _publishing(None)


def insert(result: Any, _tree: Any, params: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER the tree's `insert`: what was new to the tree, and what the request now shares."""
    _published(result, params)


def match(result: Any, req: Any, _tree: Any, *_args: Any, max_prefix_len: int | None = None, **_kwargs: Any) -> None:
    """AFTER the tree was asked for a request's prefix: when, and how much of it could have been given. The last time
    before the launch counts; the scheduler asks for requests that wait, too."""
    _matched(req, _tree, max_prefix_len)


def evict(result: Any, _tree: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER the tree was asked to make room."""
    _evicted(int(result.num_tokens_evicted))


def reset(_result: None, _tree: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER the tree's `reset`: the tree is empty."""
    _forget()


@guard.guarded
def _publishing(req: Any) -> None:
    guard.active().publishing = req


@guard.guarded
def _published(result: Any, params: Any) -> None:
    session = guard.active()
    req, session.publishing = session.publishing, None
    if req is None or session.recorder is None:
        return
    # One that was not launched in this recording has no name in it.
    rid = "" if live_server.began_before(req) else live_server.name_of(req)
    key = params.key
    session.recorder.publish(
        rid,
        req.retraction_count,
        Context(key.raw_token_ids(), release().namespace(key)),
        length=len(key),
        first_new=result.prefix_len,
        protected=release().protected_len(params, req),
    )


@guard.guarded
def _matched(req: Any, tree: Any, max_prefix_len: int | None) -> None:
    recorder = guard.active().recorder
    if recorder is None:
        return
    whole = len(req.origin_input_ids) + len(req.output_ids)
    limit = whole - 1 if max_prefix_len is None else max_prefix_len
    asked = requests.read_limit(req)
    if tree.disable or _MISSES:
        limit, why = 0, schema.CACHE_OFF
    elif asked is not None and asked <= limit and asked < whole - 1:
        limit, why = asked, schema.ASKED
    else:
        why = schema.LAST_TOKEN if limit >= whole - 1 else schema.LOGPROBS
    setattr(req, MATCHED, recorder.matching(limit, why))


@guard.guarded
def _evicted(tokens: int) -> None:
    recorder = guard.active().recorder
    if recorder is not None and tokens:
        recorder.evicted(tokens)


@guard.guarded
def _forget() -> None:
    recorder = guard.active().recorder
    if recorder is not None:
        recorder.flushed()
