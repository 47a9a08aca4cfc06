"""Gates by a probe: decided once for a request, inside the forward that computes the prompt's last row.

The row is scored after the layer of the probe's hook point, and after the interventions of that layer: what a hook
point `hook_scores` writes. SGLang computes a prompt's last position in every case, in the last chunk of it, whatever
was reused. On a CPU the forward has run when the next one is planned, under overlap scheduling too, so that the first
generated token's plan has the decision. A retracted request keeps it: it computes the same rows again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sglang_probe.engine.ledger.facts import Decision
from sglang_probe.errors import LedgerError
from sglang_probe.steering.scores import weights_DK
from sglang_probe.steering.spec import layer_of

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.instruments.steered import Steered
    from sglang_probe.engine.ledger.facts import ForwardPlan
    from sglang_probe.steering.library import Vector
    from sglang_probe.steering.spec import Probe


@dataclass(slots=True)
class Gate:
    """The gate of one request."""

    intervention: str
    """Hash of the specification that was asked."""
    probe: Probe
    prompt_len: int
    spec: str
    """JSON."""
    settle: Callable[[bool], None]
    """Told whether it opened, once."""
    decision: Decision | None = None


@dataclass(frozen=True, slots=True)
class _Due:
    """A row of the coming forward that decides a gate."""

    row: int
    index: int
    gate: Gate


class Gates:
    """The probes of a library, and the rows of the coming forward that they score.

    Args:
        probes: of the library.
    """

    def __init__(self, probes: Sequence[Vector], *, device: torch.device | str) -> None:
        self._weights_PD = weights_DK(probes).T.contiguous().to(device)
        self._number = {v.hash: i for i, v in enumerate(probes)}
        self._due: dict[int, list[_Due]] = {}
        self._plan: ForwardPlan | None = None

    def expect(
        self,
        reqs: Sequence[Any],
        steered: Sequence[Steered | None],
        starts: Sequence[int],
        ends: Sequence[int],
        plan: ForwardPlan | None,
    ) -> list[Any]:
        """Note which rows of the coming forward decide a gate.

        Args:
            plan: takes the decisions; None: nobody records the forward.

        Returns the requests that compute what waits for their gate before it is decided: there is no such scheduling
        in SGLang, and they must not go on.
        """
        self._plan = plan
        late, offset = [], 0
        for i, (req, s, start, end) in enumerate(zip(reqs, steered, starts, ends, strict=True)):
            if s is not None and (gate := s.gate) is not None and gate.decision is None:
                last = gate.prompt_len - 1
                if start <= last < end:
                    due = _Due(offset + last - start, i, gate)
                    self._due.setdefault(layer_of(gate.probe.hook_point), []).append(due)
                if end > gate.prompt_len:
                    late.append(req)
            offset += end - start
        return late

    def reads(self, layer: int) -> bool:
        """Whether a gate of the forward at hand is decided after this layer."""
        return layer in self._due

    def decide(self, layer: int, x_ND: torch.Tensor) -> None:
        """Score the rows of a layer and settle their gates.

        Args:
            x_ND: the residual stream after the layer, changes included.

        Raises:
            LedgerError: the layer has fewer rows than the plan.
        """
        due = self._due.pop(layer)
        rows = [d.row for d in due]
        if max(rows) >= len(x_ND):
            raise LedgerError(f"layer {layer} has {len(x_ND)} rows, and row {max(rows)} decides a gate")
        w_GD = self._weights_PD[[self._number[d.gate.probe.hash] for d in due]]
        # Row by row, so that a score has the same bits whatever else is in the batch.
        scores = (x_ND[rows].float() * w_GD).sum(-1).tolist()
        plan = self._plan
        for d, score in zip(due, scores, strict=True):
            gate = d.gate
            opened = gate.probe.opens(score)
            gate.decision = Decision(
                intervention=gate.intervention,
                probe=gate.probe.name,
                hook_point=gate.probe.hook_point,
                position=gate.prompt_len - 1,
                attempt=0 if plan is None else plan.attempts[d.index],
                forward_id=-1 if plan is None else plan.forward_id,
                score=score,
                threshold=gate.probe.threshold,
                opened=opened,
                spec=gate.spec,
            )
            gate.settle(opened)
            if plan is not None:
                plan.gates[d.index] = gate.decision

    def forget(self) -> None:
        """The forward at hand is over."""
        self._due = {}
        self._plan = None
