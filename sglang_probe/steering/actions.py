"""What is done by a feature, or along a direction, where it is deployed."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from sglang_probe.config import Config


class Clamp(Config):
    """What is done to the feature where it is deployed."""

    model_config = ConfigDict(allow_inf_nan=False)

    mode: Literal["clamp", "cap", "ablate_feature"]
    value: float | None = None
    """The activation that `clamp` sets, where below zero is past taking the feature out, and that `cap` does not pass;
    `ablate_feature` has none."""
    threshold: float = Field(default=0.0, ge=0)
    """Activations up to it are left alone."""

    @model_validator(mode="after")
    def _has_its_value(self) -> Clamp:
        if (self.value is None) != (self.mode == "ablate_feature"):
            raise ValueError("`clamp` and `cap` need a `value`, and `ablate_feature` has none")
        if self.mode == "cap" and self.value is not None and self.value < 0:
            raise ValueError("a `cap` below zero would change rows in which the feature is not active: use `clamp`")
        return self

    @property
    def amount(self) -> float:
        """As `steering.spec.Step` has it."""
        return 1.0 if self.value is None else self.value


class Action(Config):
    """What is done along a direction where it is deployed."""

    model_config = ConfigDict(allow_inf_nan=False)

    mode: Literal["cap", "clamp", "project_out", "add"]
    value: float
    """The projection on the direction that `cap` does not pass, or that `clamp` sets, of either sign; the length that
    `add` adds, below zero against the direction; the share of the projection that `project_out` takes, mostly 1."""
    threshold: ClassVar[float] = 0.0
    """It acts on every row: a direction is not active or inactive, as a feature is."""

    @model_validator(mode="after")
    def _does_something(self) -> Action:
        if self.value == 0 and self.mode in ("add", "project_out"):
            raise ValueError(f"`{self.mode}` by 0 does nothing")
        return self

    @property
    def amount(self) -> float:
        """As `steering.spec.Step` has it."""
        return self.value
