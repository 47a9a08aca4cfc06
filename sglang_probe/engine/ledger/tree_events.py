"""What the radix tree took, gave and lost, in one order (`schema.TREE`); host integers only, no tensor."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from sglang_probe.engine.ledger.facts import Context, ForwardPlan, Matched
from sglang_probe.run import schema

Event = tuple[Any, ...]
"""A row of `schema.TREE`."""


class TreeEvents:
    """The events of one recording.

    Args:
        forward: the first forward pass of the recording.
        sliding: the tree has a second component, of layers with windows, whose entries are lost apart from the others.
    """

    def __init__(self, forward: int, *, sliding: bool = False) -> None:
        self._sliding = sliding or None
        self._order = 0
        self._key = secrets.token_bytes(16)
        self._waiting = [_event(0, forward, schema.OPENED)]

    def asked(self) -> tuple[TreeEvents, int]:
        """The tree is asked for a request's prefix, now: the first two of the `Matched` with which the request is
        launched. Asked again, the last one counts; SGLang asks at each step for each request that waits."""
        self._order += 1
        return self, self._order

    def match(self, plan: ForwardPlan, i: int, context: Context) -> Event:
        """Request `i` of a forward begins; the event belongs to that forward, which may be committed later."""
        m = context.matched
        if m is None or m.recording is not self:
            self._order += 1
            m = Matched(self, self._order, None, None)
        return _event(
            m.order,
            plan.forward_id,
            schema.MATCHED,
            rid=plan.rids[i],
            attempt=plan.attempts[i],
            start=0,
            end=plan.starts[i],
            namespace=self._namespace(context),
            limit=m.limit,
            limited_by=m.limited_by,
            labels=context.labels,
            sliding=self._sliding,
        )

    def published(self, forward: int, rid: str, attempt: int, context: Context, first_new: int, length: int) -> None:
        """The tree holds `[0, length)` of a request. `[first_new, length)` was new to it, or took the place of older
        entries."""
        self._add(
            forward,
            schema.PUBLISHED,
            rid=rid or None,
            attempt=attempt,
            start=min(first_new, length),
            end=length,
            namespace=self._namespace(context),
        )

    def evicted(self, forward: int, tokens: int) -> None:
        """The tree lost entries in so many slots, for what `forward` needs."""
        self._add(forward, schema.EVICTED, tokens=tokens)

    def flushed(self, forward: int) -> None:
        """The tree lost everything. Again and again on a server that is idle is once: nothing was there to lose."""
        last = self._waiting[-1] if self._waiting else None
        if last is None or last[_EVENT] != schema.FLUSHED or last[_ORDER] != self._order:
            self._add(forward, schema.FLUSHED)

    def take(self) -> list[Event]:
        """Events since the last time, but those of matches."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def _add(self, forward: int, event: str, **fields: Any) -> None:
        self._order += 1
        self._waiting.append(_event(self._order, forward, event, **fields))

    def _namespace(self, context: Context) -> str | None:
        """A name for what separates prefixes beside tokens; clients' salts are not written."""
        of = context.namespace
        if of is None or (isinstance(of, tuple) and all(part is None for part in of)):
            return None
        told = repr(of).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(told, key=self._key, digest_size=8).hexdigest()


_ORDER, _EVENT = 0, 2
_FIELDS = tuple(schema.TREE.names[3:])


def _event(order: int, at_forward: int, event: str, **fields: Any) -> Event:
    return (order, at_forward, event, *(fields.get(name) for name in _FIELDS))
