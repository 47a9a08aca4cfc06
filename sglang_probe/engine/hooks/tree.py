"""What the radix tree takes and gives back, for the lineage.

Where a release publishes is its adapter's to say (`Release.publication_hooks`). 0.5.23 inserts a request's entries
once, and then a second time only to split the leaf at the end of the prompt; the first insertion says what the tree
had already.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_probe.engine.hooks import guard, requests
from sglang_probe.engine.hooks.instruments import live as live_server
from sglang_probe.engine.ledger.facts import Context, Matched
from sglang_probe.engine.releases import release
from sglang_probe.errors import UnsupportedError
from sglang_probe.run import schema

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig

MATCHED = "_sglang_probe_matched"
"""Attribute of a `Req`: when the tree was asked last (`Recorder.asked`), `max_prefix_len`, and whether it is off."""

_MISSES = os.environ.get("SGLANG_RADIX_FORCE_MISS", "").lower() in ("1", "true", "yes", "y")


def refuse_other_trees(tree: Any) -> None:
    """Refuse every cache but SGLang's radix trees that were attacked: of full attention, and on releases whose adapter
    says so with a component of sliding windows. Recurrent states live in components that are copied, not matched.

    Raises:
        UnsupportedError: names the cache and its components.
    """
    if not release().is_handled_tree(tree):
        named = ", ".join(sorted(str(getattr(c, "name", c)).lower() for c in getattr(tree, "components", ()))) or "none"
        raise UnsupportedError(
            f"the accounting is proved for {release().trees} only; this model's cache is "
            f"{type(tree).__name__} with components: {named} (sliding-window, mamba or hybrid attention)",
            fix="use a model whose layers all have such attention, or run without the probe",
        )


def refuse_latent(model_config: Any) -> None:
    """Refuse models with multi-head latent attention on releases on which their ledger was not attacked.

    Raises:
        UnsupportedError: the model is one.
    """
    if model_config.attention_arch.name == "MLA" and not release().latent:
        raise UnsupportedError(
            "the accounting of models with multi-head latent attention (MLA) is not proved on SGLang "
            f"{release().version}",
            fix="use SGLang 0.5.22 or 0.5.23, or run without the probe",
        )


def refuse_beside_rows(tree: Any, config: EngineProbeConfig) -> None:
    """Refuse telemetry, interventions, monitors and kept sets where a slot is not the entry of every layer. Rows are
    those of the forward's own tokens, whatever their slots.

    Raises:
        UnsupportedError: the cache has a component beside that of full attention.
    """
    asked = [n for n in ("telemetry", "steer", "monitor", "kept") if getattr(config, n) is not None]
    if asked and len(getattr(tree, "components", ())) > 1:
        raise UnsupportedError(
            f"`{asked[0]}` is not proved for models whose sliding layers keep their entries in a pool of their own: "
            "a position's slot is that of the other layers alone",
            fix="record the ledger and rows of the residual stream (no `telemetry`, `steer`, `monitor` or `kept`)",
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


def insert_asked(original: Callable[..., Any], tree: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND the tree's `insert`, where the tree can also take entries below what is new to it: it is asked which."""
    _ask(tree, params)
    result = original(tree, params, *args, **kwargs)
    _published(result, params)
    return result


def reset(_result: None, _tree: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER the tree's `reset`: the tree is empty."""
    _forget()


@guard.guarded
def _publishing(req: Any) -> None:
    guard.active().publishing = req


@guard.guarded
def _ask(tree: Any, params: Any) -> None:
    if len(tree.components) > 1:
        params.track_adopted_ranges = True


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
        taken=release().taken(result),
    )


@guard.guarded
def _matched(req: Any, tree: Any, max_prefix_len: int | None) -> None:
    """Of each request that waits, at each step: what it comes to is found once, at the launch (`matched`)."""
    recorder = guard.active().recorder
    if recorder is not None:
        setattr(req, MATCHED, (recorder.asked(), max_prefix_len, tree.disable))


def matched(req: Any) -> Matched | None:
    """Of a request that is being launched: when the tree was asked for its prefix, and how much it could have given and
    why no more. None: nobody saw it. Runs inside guarded code."""
    found = getattr(req, MATCHED, None)
    if found is None:
        return None
    (recording, order), max_prefix_len, off = found
    whole = len(req.origin_input_ids) + len(req.output_ids)
    limit = whole - 1 if max_prefix_len is None else max_prefix_len
    asked = requests.read_limit(req)
    if off or _MISSES:
        return Matched(recording, order, 0, schema.CACHE_OFF)
    if asked is not None and asked <= limit and asked < whole - 1:
        return Matched(recording, order, asked, schema.ASKED)
    return Matched(recording, order, limit, schema.LAST_TOKEN if limit >= whole - 1 else schema.LOGPROBS)


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
