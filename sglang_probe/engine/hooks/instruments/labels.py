"""Requests that say what they belong to: `labels: {session: ..., tenant: ...}`.

They are written beside the moment at which the request asked the radix tree (`schema.TREE`), as the client gives them,
and change nothing else. Where a request names no `session`, SGLang's own session id counts as one, or its routing key,
which the OpenAI endpoints take from the header `x-smg-routing-key`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks.instruments.base import Instrument

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig

SESSION = "session"
_MOST = 200
"""Characters of a session id or routing key that are written."""


class Labels(Instrument):
    """See the module. Needs nothing, so that every recording honours it."""

    name = "labels"
    field = "labels"

    @classmethod
    def wanted(cls, config: EngineProbeConfig) -> bool:
        return True


def labels_of(ask: Ask, req: Any) -> str | None:
    """What a request belongs to, as JSON; None: it does not say."""
    own = getattr(req, "session_id", None) or getattr(req, "routing_key", None)
    if ask.labels is None and not own:
        return None
    told = dict(ask.labels or {})
    if own:
        told.setdefault(SESSION, str(own)[:_MOST])
    return json.dumps(told, sort_keys=True)
