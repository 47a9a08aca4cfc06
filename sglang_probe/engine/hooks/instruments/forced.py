"""Forced decoding: prescribed tokens take the place of sampled ones, through the real decode path.

The replacement happens on the sampler's output, before SGLang relays it to the next step (`Scheduler.run_batch`,
`_relay_forward_payload`), so that overlap scheduling, the KV cache and stopping see the prescribed token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.base import Instrument
from sglang_probe.engine.releases.base import Hook, Release

if TYPE_CHECKING:
    from sglang_probe.engine.ledger.facts import ForwardPlan

_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"


class ForcedOutputs(Instrument):
    """See the module."""

    name = "forced outputs"
    field = "force"
    one_rank = True
    features = ("forced decoding",)
    rows: tuple[list[int], list[int]] | None = None
    """Batch rows of the forward that was launched last, and the tokens that they must yield. A sample that waits for a
    grammar comes late, but before the next launch."""

    @classmethod
    def hooks(cls, release: Release) -> list[Hook]:
        return [(f"{_RUNNER}.sample", sample, "AFTER")]

    def launch(self, reqs: Sequence[Any], asks: Sequence[Ask], plan: ForwardPlan) -> None:
        self.rows = forced_tokens(asks, plan)

    def drop(self) -> None:
        self.rows = None


def forced_tokens(asks: Sequence[Ask], plan: ForwardPlan) -> tuple[list[int], list[int]] | None:
    """Rows of this forward whose sampled token is prescribed, and the tokens. A prescription of None leaves the sample.

    A forward that ends at position `end` samples output number `end - prompt_len`; a prefill chunk before the last
    ends inside the prompt and its sample is discarded by the engine.
    """
    rows, tokens = [], []
    for i, ask in enumerate(asks):
        if ask.force is None:
            continue
        n = plan.ends[i] - plan.prompt_lens[i]
        if 0 <= n < len(ask.force) and (token := ask.force[n]) is not None:
            rows.append(i)
            tokens.append(token)
    return (rows, tokens) if rows else None


def sample(next_token_ids: torch.Tensor, _runner: Any, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    """AFTER `ModelRunner.sample`."""
    _replace(next_token_ids)
    return next_token_ids


@guard.guarded
def _replace(next_token_ids: torch.Tensor) -> None:
    forced = guard.active().of(ForcedOutputs)
    if forced is None or forced.rows is None:
        return
    rows, tokens = (torch.tensor(x).to(next_token_ids.device, non_blocking=True) for x in forced.rows)
    next_token_ids[rows] = tokens.to(next_token_ids.dtype)
