"""Rows in the response: a request asks for rows of its own positions, and fetches them after it ended.

Here it is only admitted and announced. What is kept and written is `engine/live/answers.py`, on a thread of its own;
`GET /probe/rows/<handle>` is `engine/hooks/http.py`. Nothing is patched for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang_probe.ask import WHERE, Ask
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.base import Instrument
from sglang_probe.engine.hooks.instruments.rows import Rows
from sglang_probe.errors import ConfigError

if TYPE_CHECKING:
    from sglang_probe.engine.ledger.facts import ForwardPlan


class RowsInResponse(Instrument):
    """See the module."""

    name = "rows in the response"
    field = "rows"

    def admit(self, ask: Ask, req: Any) -> None:
        if ask.rows is None:
            return
        recorded, live = self.config.hook_points, self.config.live
        points = ask.rows.hook_points or tuple(recorded)
        if unknown := [p for p in points if p not in recorded]:
            raise ConfigError(f"{WHERE}.rows: `{unknown[0]}` is not recorded here; {', '.join(recorded)} are")
        captured = guard.active().of(Rows)
        assert captured is not None
        assert live is not None
        new = req.sampling_params.max_new_tokens
        longest = min(captured.context, len(req.origin_input_ids) + (captured.context if new is None else new))
        positions = len(ask.rows.positions(longest))
        megabytes = positions * sum(captured.row_bytes(p) for p in dict.fromkeys(points)) / 1e6
        if megabytes > live.rows.most_megabytes:
            raise ConfigError(
                f"{WHERE}.rows: {positions} positions at {len(points)} hook points may be {megabytes:.1f} MB, and this "
                f"server gives {live.rows.most_megabytes:g} MB to a request; ask for `last`, `windows` or fewer "
                "`hook_points`"
            )

    def launch(self, reqs: Sequence[Any], asks: Sequence[Ask], plan: ForwardPlan) -> None:
        session = guard.active()
        live = session.live
        if live is None or live.answers is None:
            return
        for ask, name, context in zip(asks, plan.rids, plan.contexts, strict=True):
            if ask.rows is not None and context is not None:
                live.answers.ask(name, ask.rows, session.epoch)

    def status(self) -> dict[str, Any]:
        live = guard.active().live
        return {} if live is None or live.answers is None else {"rows_asked": live.answers.status()}
