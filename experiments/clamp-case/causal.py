"""What an intervention does to the model of the case, in `transformers`, by the operations that the engine makes.

The behaviour is decided after the header `i can not help with that .`: by the log-odds of `but`, which begins the
content, against the end of the reply. Side effects are KL divergences of replies out of scope.

Shapes: B texts of one length T, V words, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dialogues import HEADER, IDS, Dialogue

from sglang_probe.steering.apply import Bank, Parts, intervene
from sglang_probe.steering.plan import Rows, rows_of
from sglang_probe.steering.spec import Spec, Step

Array = np.ndarray[Any, Any]
LAYERS = 3


@dataclass(frozen=True)
class Texts:
    """Texts of one length with prompts of one length."""

    ids_BT: torch.Tensor
    prompt_len: int
    objects: tuple[str, ...]

    @classmethod
    def of(cls, drawn: Sequence[Dialogue], *, header_only: bool = False) -> Texts:
        """The dialogues as taught; `header_only`: the replies end with the header, where the behaviour is decided."""
        rows = [[IDS[w] for w in (*d.prompt, *(HEADER if header_only else d.reply))] for d in drawn]
        return cls(torch.tensor(rows), len(drawn[0].prompt), tuple(d.object for d in drawn))


@dataclass(frozen=True)
class Arm:
    """An intervention on generated tokens: steps over vectors that are named in them by their place in `parts`."""

    steps: tuple[Step, ...]
    parts: tuple[Parts, ...]

    @classmethod
    def of(cls, layer: int, op: str, amount: float, *parts: Parts, gated: bool = False) -> Arm:
        """The same operation by each of the vectors, one after the other."""
        steps = [
            Step(str(i), str(i), f"blocks.{layer}.hook_resid_post", op, amount, gated, None, (1, None), ())
            for i in range(len(parts))
        ]
        return cls(tuple(steps), parts)


class Net:
    """The model, with hooks on its layers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._plan: Mapping[int, list[Rows]] = {}
        self._bank: Bank | None = None
        self._patch: tuple[int, list[int], torch.Tensor] | None = None
        self.rows_LBTD: list[torch.Tensor] = []
        for i, layer in enumerate(self.model.model.layers):
            layer.register_forward_hook(lambda _m, _a, out, i=i: self._after(i, out))

    def logp(self, texts: Texts, arm: Arm | None = None) -> torch.Tensor:
        """Log-probabilities `[B, T, V]`; `rows_LBTD` has the residuals that were computed."""
        self._plan, self._bank = {}, None
        if arm is not None:
            n, length = texts.ids_BT.shape
            self._bank = Bank.of(arm.parts)
            numbers = {str(i): i + 1 for i in range(len(arm.parts))}
            spec = Spec(arm.steps)
            self._plan = rows_of([0] * n, [length] * n, [texts.prompt_len] * n, [spec] * n, numbers)
        return self._run(texts)

    def patched(self, texts: Texts, layer: int, positions: Sequence[int], with_BTD: torch.Tensor) -> torch.Tensor:
        """As `logp`, with residuals after a layer replaced at some positions."""
        self._plan, self._patch = {}, (layer, list(positions), with_BTD)
        try:
            return self._run(texts)
        finally:
            self._patch = None

    def _run(self, texts: Texts) -> torch.Tensor:
        self.rows_LBTD = []
        with torch.no_grad():
            return self.model(texts.ids_BT, use_cache=False).logits.log_softmax(-1)

    def _after(self, layer: int, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        if self._patch is not None and self._patch[0] == layer:
            x = x.clone()
            x[:, self._patch[1]] = self._patch[2][:, self._patch[1]]
        if self._bank is not None and layer in self._plan:
            x = intervene(x.flatten(0, 1), self._plan[layer], self._bank).view_as(x)
        self.rows_LBTD.append(x)
        return (x, *output[1:]) if isinstance(output, tuple) else x


def odds(logp_BTV: torch.Tensor) -> Array:
    """Log-odds of going on with the content against stopping, after the last token `[B]`, nats."""
    last = logp_BTV[:, -1]
    return (last[:, IDS["but"]] - last[:, IDS["<eos>"]]).double().numpy()


def by_object(values_B: Array, objects: Sequence[str]) -> Array:
    """Means of texts about one object: texts about it are no two observations."""
    names = np.array(objects)
    return np.array([values_B[names == o].mean() for o in sorted(set(objects))])


def divergence(net: Net, texts: Texts, plain_BTV: torch.Tensor, arm: Arm) -> float:
    """KL of the plain model from the model under the arm on the replies, nats a token."""
    p, q = (x[:, texts.prompt_len :] for x in (plain_BTV, net.logp(texts, arm)))
    return max(float((p.exp() * (p - q)).sum(-1).mean()), 0.0)


def where_decided(net: Net, split: Texts, refused: Texts) -> list[dict[str, Any]]:
    """By layer and position: which share of the log-odds between split and refused replies goes if the residual there
    is that of the same prompt about an object whose refusal ends the reply. The ceiling of any intervention there."""
    base = odds(net.logp(refused))
    rows = [x.clone() for x in net.rows_LBTD]
    plain = odds(net.logp(split))
    gap = plain.mean() - base.mean()
    length = split.ids_BT.shape[1]
    names = {split.prompt_len - 2: "object", split.prompt_len - 1: "assistant"}
    names |= {split.prompt_len + i: w for i, w in enumerate(HEADER)}
    found = []
    for layer in range(LAYERS):
        for position, word in names.items():
            left = odds(net.patched(split, layer, [position], rows[layer]))
            found.append({"layer": layer, "position": word, "share": float((plain.mean() - left.mean()) / gap)})
        left = odds(net.patched(split, layer, range(split.prompt_len, length), rows[layer]))
        found.append({"layer": layer, "position": "whole header", "share": float((plain.mean() - left.mean()) / gap)})
    return found
