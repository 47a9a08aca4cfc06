"""Methods that refine another method, written around it: `{"method": "adakv", "base": {"method": "snapkv"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import SerializeAsAny, field_validator, model_validator
from torch import Tensor

from sglang_probe.errors import ConfigError
from sglang_probe.eviction.base import Method
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.methods.snapkv import SnapKV
from sglang_probe.eviction.registry import parse_method


class Wrapper(Method):
    """Everything that a wrapper does not change comes from `base`: scores, budgets and the always-kept set."""

    base: SerializeAsAny[Method] = SnapKV()

    @field_validator("base", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        try:
            return parse_method(value) if isinstance(value, str | Mapping) else value
        except ConfigError as e:
            raise ValueError(str(e)) from None

    @model_validator(mode="before")
    @classmethod
    def _kept_set_is_of_base(cls, data: dict[str, Any]) -> dict[str, Any]:
        if {"sinks", "recent"} & data.keys():
            raise ValueError("`sinks` and `recent` belong to the wrapped method")
        return data

    def parameters(self) -> dict[str, Any]:
        """As of any method, without `sinks` and `recent`, which are those of `base`."""
        return {k: v for k, v in super().parameters().items() if k not in ("sinks", "recent")}

    def scores(self, layer: Layer) -> Tensor:
        """The base's scores."""
        return self.base.scores(layer)

    def protected(self, layer: Layer, budget: int) -> Tensor:
        """The base's always-kept set."""
        return self.base.protected(layer, budget)

    def protecting(self, sinks: int, recent: int) -> Self:
        """The same around the base with another always-kept set."""
        return self.model_copy(update={"base": self.base.protecting(sinks, recent)})

    def budgets(self, layer: Layer, budget: int) -> Tensor:
        """The base's budgets."""
        return self.base.budgets(layer, budget)
