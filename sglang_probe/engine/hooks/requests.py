"""A request was made: what it asks is read once, checked, and refused where it cannot be had.

SGLang answers a refused request with the message and status 400 (`Req.set_finish_with_abort`). Every tensor-parallel
rank does the same, whether or not it records: a rank that refused alone would leave the others waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments import ONE_RANK
from sglang_probe.engine.hooks.instruments.labels import Labels
from sglang_probe.errors import ConfigError

logger = logging.getLogger("sglang_probe")

_ASK = "_sglang_probe_ask"
"""Attribute of a `Req`."""


def made(req: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER SGLang made a request, before it is queued. For the release's own hook (`Release.request_hooks`)."""
    session = guard.session
    if session is None:
        return
    ask = Ask()
    if req.to_finish is None:  # else SGLang has refused it already
        try:
            ask = _admitted(session, req, scheduler.model_config)
        except ConfigError as e:
            req.set_finish_with_abort(f"sglang-probe: {e.message}")
        except Exception:  # a matter of this request alone
            logger.exception("sglang-probe could not check what request %.200s asks", req.rid)
            # One that asks nothing is none the worse for a fault of ours, unless everybody is to run under something.
            if req.sampling_params.custom_params or any(i.of_all for i in session.instruments):
                req.set_finish_with_abort("sglang-probe: what the request asks of the probe could not be checked")
    setattr(req, _ASK, ask)
    if not ask.publishes:
        req.skip_radix_cache_insert = True


def _admitted(session: Any, req: Any, model: Any) -> Ask:
    if not req.origin_input_ids:  # SGLang serves it, and ends with a forward of no rows
        raise ConfigError("the prompt has no tokens, and a forward of no rows would end the engine for everybody")
    ask = Ask.of(req.sampling_params)
    if ask.fields:
        # Other ranks have not heard of it. Labels change nothing: a request goes on without their being written.
        if session.fault is not None and session.tp_size == 1 and ask.fields != {Labels.field}:
            raise ConfigError(f"the recording has stopped, and what it would do for a request with it: {session.fault}")
        ask.refuse_beyond(session.honoured)
        if session.tp_size > 1:
            ask.refuse_on_ranks(ONE_RANK)
        ask.check(
            prompt_len=len(req.origin_input_ids),
            new_tokens=req.sampling_params.max_new_tokens or 0,
            context=model.context_len,
            vocabulary=model.vocab_size,
        )
    for instrument in session.instruments:
        if ask.fields or instrument.of_all:
            instrument.admit(ask, req)
    return ask


def beams_refused() -> str | None:
    """Why a request for beam search is refused: its rows are of no request's position."""
    if guard.session is None:
        return None
    return (
        "sglang-probe: beam search (`beam_width`) computes rows that belong to no position of a request, and is not "
        "served while the probe is installed; ask without it"
    )


def ask_of(req: Any) -> Ask:
    """What a request asked when it was made. One that SGLang made for its own use asks nothing."""
    ask: Ask = getattr(req, _ASK, _NOTHING)
    return ask


def asks_of(reqs: Sequence[Any]) -> list[Ask]:
    """What each of these requests asks."""
    return [ask_of(req) for req in reqs]


def read_limit(req: Any) -> int | None:
    """Positions that a request may reuse from the radix cache at most; None: as SGLang decides. For the release's own
    match hook."""
    session = guard.session
    if session is None:
        return None
    ask = ask_of(req)
    if not ask.fields and not any(instrument.of_all for instrument in session.instruments):
        return None
    limits = (instrument.read_limit(ask, req) for instrument in session.instruments)
    return min((n for n in limits if n is not None), default=None)


_NOTHING = Ask()
