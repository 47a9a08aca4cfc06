"""The base of all eviction methods and of the oracles they are measured against.

A method is a frozen pydantic model: its fields are its whole configuration, and `describe()` prints all of them,
because window, pooling, group reduction and always-kept set move results by more than many methods differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from sglang_probe.config import Config
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.select import protected_mask, top_k


@dataclass(frozen=True)
class Selection:
    """What a policy keeps of the prompt."""

    keep_TGL: Tensor
    """Bool `[..., T, G, L]`; T is 1 for an eviction, which holds for all decode steps."""
    scores_TGL: Tensor
    """The scores behind it, same axes."""
    evicts: bool
    """False where everything stays in memory and only what is read changes by step."""

    @property
    def keep_GL(self) -> Tensor:
        """Kept positions of an eviction, `[..., G, L]`."""
        if self.keep_TGL.shape[-3] != 1:
            raise ValueError("the selection changes by decode step; use keep_TGL")
        return self.keep_TGL.squeeze(-3)

    @property
    def scores_GL(self) -> Tensor:
        """Scores of an eviction, `[..., G, L]`."""
        if self.scores_TGL.shape[-3] != 1:
            raise ValueError("the scores change by decode step; use scores_TGL")
        return self.scores_TGL.squeeze(-3)


class Policy(Config, ABC):
    """Scores prompt positions and keeps the best under a budget.

    A budget counts positions per kv head and layer and includes the always-kept ones.
    """

    name: ClassVar[str]
    """Name in configurations; set by the registry."""
    source: ClassVar[str]
    """Where the method is published."""
    leaks: ClassVar[bool] = False
    """Whether it reads what only the future knows."""

    sinks: int = Field(default=0, ge=0)
    """First positions that are always kept."""
    recent: int = Field(default=0, ge=0)
    """Last prompt positions that are always kept."""

    @abstractmethod
    def scores(self, layer: Layer) -> Tensor:
        """Importance of each position, finite, `[..., G, L]` (`[..., T, G, L]` where it changes by decode step)."""

    def protected(self, layer: Layer, budget: int) -> Tensor:
        """Always-kept positions, bool, broadcast to `[..., G, L]`."""
        return protected_mask(layer.length, sinks=self.sinks, recent=self.recent)

    def protecting(self, sinks: int, recent: int) -> Self:
        """The same policy with another always-kept set, so that several can be compared under one.

        What a policy keeps by its rule, such as the recent half of H2O, is its own and stays.
        """
        return self.model_copy(update={"sinks": sinks, "recent": recent})

    def budgets(self, layer: Layer, budget: int) -> Tensor:
        """Positions to keep per kv head, `[..., G]`; `budget` everywhere unless the method allocates."""
        return torch.full(layer.shape_GL[:-1], min(budget, layer.length))

    def caveat(self, layers: int) -> str | None:
        """What a reader must know of this policy in a model of so many layers."""
        return None

    def select(self, layer: Layer, budget: int) -> Selection:
        """Keep `budget` positions per kv head, on average over heads and layers where the method allocates.

        Raises:
            ProbeError: something the method needs was not captured, or the budget does not hold the always-kept set.
        """
        scores = self.scores(layer)
        keep = top_k(scores, self.budgets(layer, budget), self.protected(layer, budget))
        return Selection(keep.unsqueeze(-3), scores.unsqueeze(-3), evicts=True)

    def parameters(self) -> dict[str, Any]:
        """Every parameter with its value; a wrapped method appears as its own dictionary with the key `method`."""
        return {
            k: {"method": v.name, **v.parameters()} if isinstance(v, Policy) else v
            for k in type(self).model_fields
            for v in [getattr(self, k)]
        }

    def describe(self) -> str:
        """The method and all its parameters on one line."""
        return _describe({"method": self.name, **self.parameters()})


class Method(Policy):
    """An eviction or selection method. It sees the prompt and, at most, what decoding has already produced."""


class Oracle(Policy):
    """A bound that reads the future, never listed among methods."""

    leaks: ClassVar[bool] = True


def _describe(values: dict[str, Any]) -> str:
    inner = ", ".join(f"{k}={_describe(v) if isinstance(v, dict) else v}" for k, v in values.items() if k != "method")
    return f"{values['method']}({inner})"
