"""Disables one safeguard of the probe at a time, to show that the attack would notice.

Each function takes away one idea; its name, with spaces, is what `PROBE_SABOTAGE` says.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_probe.engine.capture.graph_taps import GraphTaps, Snapshot
from sglang_probe.engine.capture.taps import Taps
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks import scheduler as accounting
from sglang_probe.engine.hooks import tree as lineage
from sglang_probe.engine.ledger import lineage as shadow
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder


def ignore_rebinds() -> None:
    publish = Lineage.publish

    def without(self: Any, rid: str, tokens: Any, length: int, first_new: int, _protected: int, *more: Any) -> Any:
        return publish(self, rid, tokens, length, first_new, first_new, *more)

    Lineage.publish = without  # type: ignore[method-assign]


def ignore_publications() -> None:
    Recorder.publish = lambda self, *a, **k: None  # type: ignore[method-assign]


def ignore_the_end_of_decode() -> None:
    """What a request decoded is published as unknown."""
    fill = shadow._Owners.fill
    publish = Lineage.publish

    def without(self: Any, *args: Any) -> Any:
        shadow._Owners.fill = lambda own, end: own.extend(  # type: ignore[method-assign]
            np.full(max(0, end - own.length), shadow.BEFORE, dtype=np.int64)
        )
        try:
            return publish(self, *args)
        finally:
            shadow._Owners.fill = fill  # type: ignore[method-assign]

    Lineage.publish = without  # type: ignore[method-assign]


def token_keys_in_pages() -> None:
    init = Lineage.__init__

    def with_page_of_one(self: Any, page_size: int, capacity: int) -> None:
        init(self, 1, capacity * page_size)

    Lineage.__init__ = with_page_of_one  # type: ignore[method-assign]


def keep_the_first_owner() -> None:
    """Entries of evicted nodes are inserted anew; whoever keeps the first owner is wrong from then on."""
    remember = Lineage._remember

    def keep(self: Any, keys: list[int], values: Any) -> None:
        new = [(k, v) for k, v in zip(keys, values, strict=True) if k not in self._young and k not in self._old]
        remember(self, [k for k, _ in new], [v for _, v in new])

    Lineage._remember = keep  # type: ignore[method-assign]


def one_namespace() -> None:
    """Salts and extra keys do not separate prefixes."""
    shadow._seed = lambda _namespace: 0  # type: ignore[assignment]


def hash_the_page_alone() -> None:
    """The tokens before a page do not count."""

    def alone(self: Any, ids: Any, namespace: object) -> Any:
        usable = len(ids) // self._page * self._page
        with np.errstate(over="ignore"):
            words = shadow._mix(ids[:usable].astype(np.uint64)).reshape(-1, self._page)
            return words.sum(axis=1, dtype=np.uint64) + np.uint64(shadow._seed(namespace))

    Lineage._page_hashes = alone  # type: ignore[method-assign]


def forget_too_soon() -> None:
    """A memory much smaller than the KV pool."""
    init = Lineage.__init__

    def small(self: Any, page_size: int, _capacity: int) -> None:
        init(self, page_size, 16)

    Lineage.__init__ = small  # type: ignore[method-assign]


def forget_published_names() -> None:
    """A request's name goes when it ends, though its entries are remembered."""
    end = Lineage.end

    def without(self: Any, rid: str) -> None:
        own = self._running.get(rid)
        if own is not None:
            own.published = False
        end(self, rid)

    Lineage.end = without  # type: ignore[method-assign]


def ignore_flushes() -> None:
    """Of owners; that the tree was flushed is told, because causes ask for it."""
    Lineage.forget_tree = lambda self: None  # type: ignore[method-assign]


def take_both_insertions() -> None:
    """A checkpoint inserts twice; the second time to split a leaf."""
    published = lineage._published

    def again(result: Any, params: Any) -> None:
        session = guard.session
        req = session.publishing if session is not None else None
        published(result, params)
        if session is not None:
            session.publishing = req

    lineage._published = again


def no_attempts() -> None:
    plan_of = accounting.plan_of

    def flat(batch: Any, **kwargs: Any) -> Any:
        plan = plan_of(batch, **kwargs)
        plan.attempts = [0] * len(plan.attempts)
        return plan

    accounting.plan_of = flat


def decode_rows_as_prefill() -> None:
    """The decode rows of a mixed batch are not told from its prefill rows."""
    plan_of = accounting.plan_of

    def mixed(batch: Any, **kwargs: Any) -> Any:
        plan = plan_of(batch, **kwargs)
        if plan.mode == "mixed":
            plan.decoding = [False] * len(plan.rids)
            plan.contexts = [accounting.context_of(r) for r in batch.reqs]
        return plan

    accounting.plan_of = mixed


def count_outputs() -> None:
    """The decoded position from the length of the output, which lags one step behind under overlap scheduling."""
    plan_of = accounting.plan_of

    def lagging(batch: Any, **kwargs: Any) -> Any:
        plan = plan_of(batch, **kwargs)
        if plan.mode == "decode":
            plan.starts = [len(r.origin_input_ids) + len(r.output_ids) - 1 for r in batch.reqs]
            plan.ends = [s + 1 for s in plan.starts]
        return plan

    accounting.plan_of = lagging


def ignore_aborts() -> None:
    """Of requests that are dropped outside a forward's result."""
    accounting._aborted = lambda _req: None


def ignore_who_had_finished() -> None:
    """A discarded step is taken for an output, and a request ends a second time."""
    commit = accounting._commit
    accounting._commit = lambda batch, result, _finished, retracted: commit(batch, result, set(), retracted)


def ignore_the_discard_at_the_end() -> None:
    end = Recorder.end

    def without(self: Any, ended: Any) -> None:
        pending, self._pending = self._pending, type(self._pending)()
        try:
            end(self, ended)
        finally:
            self._pending = pending

    Recorder.end = without  # type: ignore[method-assign]


def ignore_the_discard_at_retraction() -> None:
    commit = accounting._commit
    accounting._commit = lambda batch, result, finished, _retracted: commit(batch, result, finished, set())


def commit_the_newest_first() -> None:
    """Forwards are committed without asking which one a result belongs to."""
    commit = Recorder.commit

    def newest(self: Any, tag: int, **kwargs: Any) -> None:
        self._pending.reverse()
        try:
            commit(self, self._pending[0].tag, **kwargs)
        finally:
            self._pending.reverse()

    Recorder.commit = newest  # type: ignore[method-assign]


def believe_a_refused_prompt() -> None:
    """SGLang served one token in its place."""
    end_of = accounting.end_of

    def as_abort(req: Any, reason: str | None = None) -> Any:
        import dataclasses

        end = end_of(req, reason)
        return dataclasses.replace(end, finish_reason="abort") if end.finish_reason == "refused" else end

    accounting.end_of = as_abort


def write_no_rebinds() -> None:
    """The lineage follows them, the run does not say so."""
    publish = Recorder.publish

    def unwritten(self: Any, *args: Any, **kwargs: Any) -> None:
        publish(self, *args, **kwargs)
        self._rebinds.clear()

    Recorder.publish = unwritten  # type: ignore[method-assign]


def write_the_first_origin_for_all() -> None:
    """A request that reuses from several is written as if it reused from the first of them alone."""
    launch = Lineage.launch

    def first(self: Any, *args: Any) -> Any:
        import dataclasses

        origins = launch(self, *args)
        return [dataclasses.replace(o, rid=origins[0].rid, attempt=origins[0].attempt) for o in origins]

    Lineage.launch = first  # type: ignore[method-assign]


def exchange_two_owners() -> None:
    """Of a request that reuses from several, what the first two of them computed is told the other way round."""
    launch = Lineage.launch

    def exchanged(self: Any, *args: Any) -> Any:
        import dataclasses

        origins = launch(self, *args)
        known = [i for i, o in enumerate(origins) if o.rid is not None]
        if len(known) > 1:
            a, b = known[:2]
            first, second = origins[a], origins[b]
            origins[a] = dataclasses.replace(first, rid=second.rid, attempt=second.attempt)
            origins[b] = dataclasses.replace(second, rid=first.rid, attempt=first.attempt)
        return origins

    Lineage.launch = exchanged  # type: ignore[method-assign]


def give_a_row_of_the_step_before() -> None:
    """Of every hook point but the embedding, a decode step gets the rows of the forward before it."""
    take = Taps.take
    before: dict[str, Any] = {}

    def stale(self: Any, tokens: int, **kwargs: Any) -> Any:
        rows = take(self, tokens, **kwargs)
        given = {k: before[k] if k in before and before[k].shape == v.shape else v for k, v in rows.items()}
        before.update(rows)
        return {**given, **({"hook_embed": rows["hook_embed"]} if "hook_embed" in rows else {})}

    Taps.take = stale  # type: ignore[method-assign]


def leave_out_a_tap() -> None:
    """The residual stream of the last tapped layer is never written."""
    from sglang_probe.engine.hooks.instruments.rows import Rows

    write = Rows.write

    def without(self: Any, hook_point: str, x_ND: Any) -> None:
        residuals = [h for h in self.config.hook_points if h.endswith("hook_resid_post")]
        if hook_point != residuals[-1]:
            write(self, hook_point, x_ND)

    Rows.write = without  # type: ignore[method-assign]


def shift_the_rows() -> None:
    take = Taps.take

    def shifted(self: Any, tokens: int, **kwargs: Any) -> Any:
        return {k: v.roll(1, 0) for k, v in take(self, tokens, **kwargs).items()}

    Taps.take = shifted  # type: ignore[method-assign]


def read_the_single_buffer() -> None:
    """The rows of a forward are read where the taps wrote them, when its result is processed."""

    def unprotected(self: Any, source: Any, tokens: int, kept: Any, *, replayed: bool) -> Snapshot:
        index = np.arange(tokens)
        return Snapshot(source[:tokens], self.columns, replayed=replayed, index=index, kept=kept)

    GraphTaps._gather = unprotected  # type: ignore[method-assign]


def steered_without_a_namespace() -> None:
    _admit(lambda req, given: setattr(req, "extra_key", given))


def steered_publish_what_is_private() -> None:
    _admit(lambda req, _given: setattr(req, "skip_radix_cache_insert", False))


def _admit(undo: Any) -> None:
    from sglang_probe.engine.hooks.instruments.steer import Steering

    admit = Steering.admit

    def without(self: Any, ask: Any, req: Any) -> None:
        given = req.extra_key
        admit(self, ask, req)
        undo(req, given)

    Steering.admit = without  # type: ignore[method-assign]


def steered_read_past_their_onset() -> None:
    from sglang_probe.engine.hooks.instruments.steer import Steering

    Steering.read_limit = lambda self, ask, req: None  # type: ignore[method-assign]


def one_history_for_all_lengths() -> None:
    """A namespace by the specification alone: `prefill` ends elsewhere in a longer prompt."""
    from sglang_probe.steering.spec import Spec

    Spec.history = lambda self, prompt_len, end=0: self.id  # type: ignore[method-assign]


def ignore_what_the_tree_took() -> None:
    """Where the tree takes a request's entries in the place of older ones, the older owner is kept."""
    from sglang_probe.engine.releases import release

    type(release()).taken = lambda self, result: ()  # type: ignore[method-assign]


def reuse_wrong_slots() -> None:
    """A fault of the engine: of a long cached prefix, one position in eight gets the slot of the next one."""
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    right = UnifiedRadixCache.prefix_device_indices

    def wrong(self: Any, req: Any) -> Any:
        slots = right(self, req)
        if len(slots) > 32:
            slots = slots.clone()
            slots[:-1:8] = slots[1::8][: len(slots[:-1:8])]
        return slots

    UnifiedRadixCache.prefix_device_indices = wrong


def tell_no_evictions() -> None:
    Recorder.evicted = lambda self, tokens: None  # type: ignore[method-assign]


SABOTAGES = {
    f.__name__.replace("_", " "): f
    for f in (
        ignore_rebinds,
        ignore_publications,
        ignore_the_end_of_decode,
        token_keys_in_pages,
        keep_the_first_owner,
        one_namespace,
        hash_the_page_alone,
        forget_too_soon,
        forget_published_names,
        ignore_flushes,
        take_both_insertions,
        no_attempts,
        decode_rows_as_prefill,
        count_outputs,
        ignore_aborts,
        ignore_who_had_finished,
        ignore_the_discard_at_the_end,
        ignore_the_discard_at_retraction,
        commit_the_newest_first,
        believe_a_refused_prompt,
        write_no_rebinds,
        write_the_first_origin_for_all,
        exchange_two_owners,
        give_a_row_of_the_step_before,
        leave_out_a_tap,
        shift_the_rows,
        read_the_single_buffer,
        steered_without_a_namespace,
        steered_publish_what_is_private,
        steered_read_past_their_onset,
        one_history_for_all_lengths,
        ignore_what_the_tree_took,
        reuse_wrong_slots,
        tell_no_evictions,
    )
}
