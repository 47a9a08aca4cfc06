"""Drive a radix tree with recorded requests: in the recorded schedule, or one after the other.

In the recorded schedule every match, forward, publication and end happens in the order in which it did, whatever the
settings: other reuse would have made other batches, and that is not simulated. A request that finds no slots is served
all the same and counted (`did_not_fit`): the engine would have let it wait or retracted another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.harvest.simulate import Tree
from sglang_probe.run import schema
from sglang_probe.run.causes import page_size
from sglang_probe.run.run import Run
from sglang_probe.studies.what_if.schedule import Computed, computed_by, leaving, uncut


@dataclass(frozen=True)
class Asked:
    """A request: what of it matters to the cache."""

    rid: str
    ids: tuple[int, ...]
    """Prompt, and output as far as it has entries."""
    prompt: int
    space: str | None
    limit: int
    given: int
    """What the engine reused."""
    publishes: bool
    replica: int = 0


@dataclass
class Outcome:
    """What a replay gave each request, by rid and attempt."""

    given: dict[tuple[str, int], int]
    did_not_fit: int = 0


@dataclass
class _Holding:
    """The slots of one running request."""

    slots: Any
    lock: Any
    protected: int
    length: int = 0
    inserted: int = 0


class Cache:
    """Running requests over a tree."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.did_not_fit = 0
        self._running: dict[tuple[str, int], _Holding] = {}

    def match(self, key: tuple[str, int], ids: Sequence[int], limit: int, space: str | None) -> int:
        """A request asks for its prefix."""
        given, node = self.tree.match(ids, limit, space)
        self._running[key] = _Holding(self.tree.slots(node), self.tree.lock(node), given, given)
        return given

    def compute(self, wanted: Sequence[Computed]) -> None:
        """A forward computes requests up to these lengths: what it prefills has its slots first, then its steps."""
        for decodes in (False, True):
            holding = [(self._running[k], end) for k, end, step in wanted if step == decodes and k in self._running]
            # What this replay reuses and the recorded engine computed is no longer computed.
            self._allocate([(h, end) for h, end in holding if end > h.length], decodes)

    def _allocate(self, need: Sequence[tuple[_Holding, int]], decodes: bool) -> None:
        page = self.tree.page
        if need and page == 1:
            self.tree.make_room(sum(end - len(h.slots) for h, end in need))
        elif need:  # SGLang asks for a page a request, whether it needs one or not (`mem_cache/allocation.py`)
            self.tree.make_room(page * len(need) + (0 if decodes else sum(end - h.length for h, end in need)))
        for h, end in need:
            if n := max(-(-end // page) * page - len(h.slots), 0):
                slots = self.tree.take(n)
                if slots is None:
                    self.did_not_fit += 1
                    continue
                h.slots = _joined(h.slots, slots)
            h.length = max(h.length, end)

    def check_step(self, keys: Sequence[tuple[str, int]]) -> None:
        """SGLang looks whether these requests can decode a step (`check_decode_mem`), and makes room for it."""
        page = self.tree.page
        held = [h for k in keys if (h := self._running.get(k)) is not None]
        self.tree.make_room(page * sum(h.length % page == 0 for h in held))

    def publish(self, key: tuple[str, int], ids: Sequence[int], prompt: int, space: str | None) -> None:
        """The tree takes what a request holds."""
        h = self._running.get(key)
        if h is None:
            return
        ids = ids[: min(len(ids), h.length)]
        whole = len(ids) // self.tree.page * self.tree.page
        if whole == 0:
            return
        length, node = self.tree.insert(ids, h.slots, h.protected, h.inserted, prompt, space)
        owned = self.tree.slots(node)
        h.slots = _joined(owned[:length], h.slots[length:])
        self.tree.unlock(h.lock)
        h.lock, h.protected, h.inserted = self.tree.lock(node), length, max(h.inserted, length)

    def end(self, key: tuple[str, int]) -> None:
        """A request is gone: what it did not publish is free."""
        h = self._running.pop(key, None)
        if h is not None:
            self.tree.unlock(h.lock)
            self.tree.give_back(h.slots[h.protected :])

    def retract(self, key: tuple[str, int], others: int) -> None:
        """A request gives up its slots for the others that decode, and SGLang makes room for some steps of theirs."""
        self.end(key)
        self.tree.make_room(others * RETRACT_STEPS)

    def flush(self) -> None:
        """The tree is emptied, which SGLang does of an idle engine alone."""
        self._running.clear()
        self.tree.flush()


def _joined(a: Any, b: Any) -> Any:
    import torch

    return torch.cat([a, b])


def as_recorded(
    run: Run, requests: pd.DataFrame, make: Callable[[], Tree], looks: Sequence[tuple[int, str, int]] = ()
) -> Outcome:
    """Replay the recorded schedule of a run.

    Args:
        looks: order, rid and limit of further times at which the tree was asked, for requests that went on waiting. A
            run does not have them (`bench/replay.py looks`).
    """
    recorded_page = page_size(run)
    outcome = Outcome({})
    tree, spans, forwards = run.tree(), run.spans(), run.forwards()
    ids = {
        str(r.rid): ([*r.prompt_ids, *([] if r.output_ids is None else r.output_ids)], int(r.prompt_len))
        for r in requests.itertuples()
    }
    ended = requests[requests["retractions"].notna()]  # not those that were in flight when their engine died
    retractions = {str(r.rid): int(r.retractions) for r in ended.itertuples()}
    for rank in sorted(tree["dp_rank"].unique()):
        cache = Cache(make())
        own = tree[tree["dp_rank"] == rank].reset_index(drop=True)
        of_rank = spans[spans["dp_rank"] == rank]
        computing = computed_by(of_rank)
        if cache.tree.page != recorded_page:
            own = own.assign(end=uncut(own, of_rank, recorded_page))
        of_forwards = forwards[forwards["dp_rank"] == rank]
        decodes = of_forwards.loc[of_forwards["mode"] == "decode", "forward_id"].tolist()
        last = leaving(own, computing, decodes, retractions)
        epoch = (own["event"] == schema.OPENED).cumsum().to_numpy(np.int64)
        events = own.assign(order=own["order"] + epoch * (1 << 40)).sort_values("order", kind="stable")
        events = _with_looks(events, looks)
        rows = list(events.itertuples())
        at = 0
        spaces = {(e.rid, e.attempt): _text(e.namespace) for e in rows if e.event == schema.MATCHED}
        for forward in of_forwards["forward_id"].tolist():
            while at < len(rows) and rows[at].at_forward <= forward:
                _event(cache, rows[at], ids, spaces, last, outcome)
                at += 1
            computes = computing.get(forward, [])
            retracted = last.get(("before", forward), [])
            if retracted:
                cache.check_step([*retracted, *(key for key, _, _ in computes)])
            for i, key in enumerate(retracted):
                cache.retract(key, len(computes) + len(retracted) - 1 - i)
            cache.compute(computes)
            for key in last.get(("forward", forward), []):
                cache.end(key)
        outcome.did_not_fit += cache.did_not_fit
    return outcome


def _with_looks(events: pd.DataFrame, looks: Sequence[tuple[int, str, int]]) -> pd.DataFrame:
    """Events of one recording with the looks among them; each at the forward of the event after it."""
    if not looks:
        return events
    base = int(events["order"].iloc[0]) >> 40 << 40
    told = pd.DataFrame([(base + order, rid, limit, _LOOKED) for order, rid, limit in looks])
    told.columns = pd.Index(["order", "rid", "limit", "event"])
    told = told[~told["order"].isin(events["order"])].assign(attempt=0)
    both = pd.concat([events, told]).sort_values("order", kind="stable")
    return both.assign(at_forward=both["at_forward"].bfill().fillna(1 << 62))


_LOOKED = "looked"


def _event(cache: Cache, e: Any, ids: Any, spaces: Any, last: Any, outcome: Outcome) -> None:
    if e.event in (schema.FLUSHED, schema.OPENED):
        cache.flush()
    if e.event == schema.MATCHED:
        together = last.get(("pause", e.order), [])
        for i, key in enumerate(together):
            cache.retract(key, len(together) - i)
    if e.event not in (schema.MATCHED, schema.PUBLISHED, _LOOKED) or e.rid not in ids:
        return
    key = (str(e.rid), int(e.attempt))
    tokens, prompt = ids[e.rid]
    if e.event == _LOOKED:
        if (e.rid, 0) in spaces:  # of one that was never launched the namespace is not known
            cache.tree.match(tokens, int(e.limit), spaces[e.rid, 0])
        return
    if e.event == schema.MATCHED:
        limit = prompt - 1 if pd.isna(e.limit) else int(e.limit)
        outcome.given[key] = cache.match(key, tokens, limit, spaces[e.rid, e.attempt])
        return
    cache.publish(key, tokens[: int(e.end)], prompt, spaces.get((e.rid, e.attempt)))
    if ("order", e.order) in last:
        cache.end(key)


def one_by_one(asked: Sequence[Asked], make: Callable[[], Tree], replicas: int = 1) -> Outcome:
    """Serve requests one after the other, each on its replica."""
    caches = [Cache(make()) for _ in range(replicas)]
    outcome = Outcome({})
    for a in asked:
        cache, key = caches[a.replica], (a.rid, 0)
        outcome.given[key] = cache.match(key, a.ids[: a.prompt], min(a.limit, a.prompt - 1), a.space)
        cache.compute([(key, a.prompt, False)])
        if a.publishes:
            cache.publish(key, a.ids[: a.prompt], a.prompt, a.space)
        for n in range(a.prompt + 1, len(a.ids) + 1):
            cache.compute([(key, n, True)])
        if a.publishes:
            cache.publish(key, a.ids, a.prompt, a.space)
        cache.end(key)
    outcome.did_not_fit = sum(c.did_not_fit for c in caches)
    return outcome


def asked_of(run: Run, requests: pd.DataFrame) -> Iterator[Asked]:
    """The requests of a run, in the order in which they first asked the tree."""
    tree = run.tree()
    matched = tree[(tree["event"] == schema.MATCHED) & (tree["attempt"] == 0)]
    first = matched.drop_duplicates("rid").set_index("rid")
    published = set(tree.loc[tree["event"] == schema.PUBLISHED, "rid"].dropna())
    known = requests[requests["rid"].isin(first.index)].set_index("rid")
    for rid in first.sort_values(["dp_rank", "at_forward", "order"], kind="stable").index:
        if rid not in known.index:
            continue
        r, m = known.loc[rid], first.loc[rid]
        output = [] if r["output_ids"] is None else list(r["output_ids"])[:-1]
        ids = tuple(int(t) for t in [*r["prompt_ids"], *output])
        n = int(r["prompt_len"])
        limit = n - 1 if pd.isna(m["limit"]) else int(m["limit"])
        yield Asked(str(rid), ids, n, _text(m["namespace"]), limit, int(m["end"]), rid in published)


def routed(asked: Sequence[Asked], router: str) -> tuple[list[Asked], int]:
    """Give each request a replica: `prefix:N` by a hash of its first tokens, `round:N` in turn.

    Raises:
        ValueError: that is no router.
    """
    kind, _, count = router.partition(":")
    if kind not in ("prefix", "round") or not count.isdigit() or int(count) < 1:
        raise ValueError(router)
    n = int(count)
    chosen = [
        (hash(a.ids[:PREFIX]) if kind == "prefix" else i) % n for i, a in enumerate(asked)
    ]  # of integers: the same in every process
    return [Asked(**{**a.__dict__, "replica": c}) for a, c in zip(asked, chosen, strict=True)], n


RETRACT_STEPS = 20
"""`SGLANG_RETRACT_DECODE_STEPS`."""

PREFIX = 64
"""Tokens by which `prefix:N` routes."""


def ordered(asked: Sequence[Asked], order: str, families: dict[str, str]) -> list[Asked]:
    """`recorded`, `family` (requests of one prefix family together), `sorted` (by their tokens), or `shuffled`.

    Raises:
        ValueError: that is no order.
    """
    if order == "recorded":
        return list(asked)
    if order == "family":
        first: dict[str, int] = {}
        for i, a in enumerate(asked):
            first.setdefault(families.get(a.rid, a.rid), i)
        return sorted(asked, key=lambda a: first[families.get(a.rid, a.rid)])
    if order == "sorted":
        return sorted(asked, key=lambda a: a.ids[: a.prompt])
    if order == "shuffled":
        return [asked[i] for i in np.random.default_rng(0).permutation(len(asked))]
    raise ValueError(order)


def _text(namespace: Any) -> str | None:
    return namespace if isinstance(namespace, str) else None
