"""Names in the ledger. Clients choose request ids, and one that retries may use the same id again.

The second request with an id is `<rid>~1` in the ledger, and so on. Ids are compared within a segment, which bounds the
memory: a segment is a run of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from sglang_probe.engine.ledger.recorder import ForwardPlan


class Names:
    """Maps the ids of requests in flight to their names in the ledger."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._aliases: dict[str, str] = {}
        self._running: set[str] = set()

    def get(self, rid: str) -> str:
        return self._aliases.get(rid, rid)

    def launch(self, plan: ForwardPlan) -> None:
        """Rename the requests of a plan in place."""
        for i, context in enumerate(plan.contexts):
            rid = plan.rids[i]
            if context is not None and rid not in self._running:
                self._running.add(rid)
                if rid in self._used:
                    self._aliases[rid] = next(n for k in itertools.count(1) if (n := f"{rid}~{k}") not in self._used)
            plan.rids[i] = self._aliases.get(rid, rid)

    def end(self, rid: str) -> str:
        """The name of a request that ends; its id may come again."""
        self._running.discard(rid)
        name = self._aliases.pop(rid, rid)
        self._used |= {rid, name}
        return name

    def new_segment(self, taken: Iterable[str]) -> None:
        """Names of another segment may be given again, but not `taken`: they reach into the new one."""
        self._used = set(taken)
