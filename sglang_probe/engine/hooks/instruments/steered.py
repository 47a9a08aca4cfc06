"""What was settled for a request under interventions, kept at SGLang's `Req` for as long as that lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sglang_probe.engine.hooks.instruments.gates import Gate
from sglang_probe.engine.ledger.facts import Under
from sglang_probe.steering.spec import Isolation, Spec

_STEERED = "_sglang_probe_steered"
"""Attribute of a `Req`."""


@dataclass(slots=True)
class Steered:
    """What was settled when a request was made; of a gated one, `spec` and `under` once more when it is decided."""

    spec: Spec | None
    """What is done in the coming forwards; None: nothing, as far as is known."""
    under: Under | None
    """How its entries are marked; None: not at all."""
    isolation: Isolation
    prompt_len: int
    gate: Gate | None = None
    of_server: bool = False
    """Whether the server's clamps alone are waited for, and the request asked for nothing."""


def steered_of(req: Any) -> Steered | None:
    """The interventions under which a request was admitted."""
    found: Steered | None = getattr(req, _STEERED, None)
    return found


def mark(req: Any, steered: Steered | None) -> None:
    """Admit a request under these interventions; None: it is under none after all."""
    setattr(req, _STEERED, steered)


def of_length(steered: Steered, length: int) -> Steered | None:
    """The same for a prompt of another length, which SGLang cut after the request was admitted; None: other positions
    would be changed than was settled, when its place in the prefix cache was."""
    spec, under = steered.spec, steered.under
    if spec is None or under is None or steered.gate is not None:
        return None
    if spec.history(length) != spec.history(steered.prompt_len):
        return None
    return Steered(spec, replace(under, prompt_len=length), steered.isolation, length)


def gated(
    spec: Spec,
    prompt_len: int,
    told: str,
    isolation: Isolation,
    decided: Callable[[bool], None] = lambda _opened: None,
) -> Steered:
    """A request that waits for its gate. Meanwhile what has no gate is done to its prompt, and marked.

    Args:
        told: the specification as JSON.
        decided: told whether it opened, within the forward that decides.
    """
    assert spec.probe is not None
    now = spec.decided(False)
    steered = Steered(now, None, isolation, prompt_len)

    def under(spec: Spec | None) -> Under | None:
        onset = None if spec is None else spec.onset(prompt_len)
        return None if onset is None else Under(name, onset, prompt_len, told)

    def settle(opened: bool) -> None:
        steered.spec = asked.decided(opened)
        steered.under = under(steered.spec)
        decided(opened)

    asked, name = spec, spec.id
    steered.gate = Gate(name, spec.probe, prompt_len, told, settle)
    # Steps of the generation may be left out or not: where the marks of these begin is not known yet.
    if now is not None and (early := under(now)) is not None and early.onset < prompt_len:
        steered.under = early
    return steered
