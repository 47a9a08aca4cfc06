"""The model in SGLang's process: where instruments are attached to it, and each forward pass of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.base import Forward
from sglang_probe.engine.hooks.instruments.steer import steering_of_session


def load_model(_result: None, runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `ModelRunner.load_model`: attach the instruments, before any graph is captured."""
    from sglang.srt.runtime_context import get_parallel

    if runner.is_draft_worker:
        return
    session = guard.active()
    session.tp_size = get_parallel().tp_size
    session.of_model(runner.model, runner.device)
    for instrument in session.instruments:
        instrument.attach(runner)


def forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `ModelRunner.forward`."""
    if runner.is_draft_worker:
        return original(runner, forward_batch, *args, **kwargs)
    _load(forward_batch)
    at_hand = _before(runner, forward_batch)
    output = original(runner, forward_batch, *args, **kwargs)
    _after(at_hand, output)
    return output


def _load(forward_batch: Any) -> None:
    """Interventions that are part of graphs; also of a forward that nobody records."""
    if (steering := steering_of_session()) is not None:
        steering.load(forward_batch)


@guard.guarded
def _before(runner: Any, forward_batch: Any) -> Forward:
    session = guard.active()
    plan = session.plan
    # Rows of a forward that nobody can tell apart are not written.
    at_hand = Forward(runner, forward_batch, None if plan is None or plan.unaccounted is not None else plan)
    for instrument in session.instruments:
        instrument.before(at_hand)
    return at_hand


@guard.guarded
def _after(at_hand: Forward | None, output: Any) -> None:
    if at_hand is None:  # the recording opened, or failed, meanwhile
        return
    at_hand.replayed = bool(output.can_run_graph)
    at_hand.logits = getattr(getattr(output, "logits_output", None), "next_token_logits", None)
    for instrument in guard.active().instruments:
        instrument.after(at_hand)
