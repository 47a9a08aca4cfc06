"""Attention telemetry: what it is recorded with, and which numbers it has. Stored in the manifest of a run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from sglang_probe.config import Config
from sglang_probe.errors import ConfigError, UnsupportedError

REGIONS = ("sinks", "system", "prompt", "window", "generated")
"""Where weight goes: the first positions, the rest of the system prompt, the rest of the prompt, its last positions
(whatever their class), and generated tokens. They part the keys; the first that fits is taken, `window` before
`system`."""

NUMBERS = ("entropy", "entropy_without_sinks", "support", *(f"mass_{r}" for r in REGIONS), "jump")
"""One of each per step, layer and head."""


class TelemetryOptions(Config):
    """What the numbers depend on; stored with them."""

    sinks: int = Field(default=4, ge=0)
    """First positions that count as attention sinks."""
    window: int = Field(default=32, ge=0)
    """Last prompt positions that count as the observation window."""
    top_k: int = Field(default=8, ge=1)
    """Positions listed with the most weight."""
    memory: int = Field(default=4, ge=1)
    """Measured steps before, whose mean a step is compared with for its jump score."""
    every: PositiveInt = 1
    """Decode steps 1, 1 + every, 1 + 2 · every, ... are measured."""


class TelemetryConfig(TelemetryOptions):
    """`telemetry` of a configuration. The cost of a measured step is stated in docs/evidence/benchmarks.md."""

    layers: list[int] | Literal["all"] = "all"
    """Layers that are measured, by number from 0."""
    every: PositiveInt = 4
    """Decode steps 1, 1 + every, 1 + 2 · every, ... are measured."""
    top_k: int = Field(default=8, ge=0)
    """Positions listed with the most weight: at least one; with `by: lists` there are none."""
    memory: int = Field(default=4, ge=0)
    """Measured steps before, whose mean a step is compared with for its jump score; with `by: lists` there are none."""
    by: Literal["kernel", "lists"] = "kernel"
    """What computes telemetry on an accelerator. `kernel`: a Triton kernel of ours. `lists`: FlashInfer's paged decode,
    which is given each region as a list of cache entries. It gives no weights of single positions, so that no top
    positions are listed and `jump` is NaN."""

    @model_validator(mode="before")
    @classmethod
    def _lists_know_no_positions(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if given.get("by") != "lists":
            return given
        if asked := [name for name in ("top_k", "memory") if given.get(name)]:
            raise ValueError(
                f"`{asked[0]}` needs `by: kernel`: lists give weights by region, no top positions and no `jump`"
            )
        return {**given, "top_k": 0, "memory": 0}

    @model_validator(mode="after")
    def _a_kernel_lists_positions(self) -> TelemetryConfig:
        if self.by == "kernel" and 0 in (self.top_k, self.memory):
            raise ValueError("`top_k` and `memory` are at least 1 with `by: kernel`")
        return self

    @field_validator("layers")
    @classmethod
    def _a_set(cls, layers: list[int] | Literal["all"]) -> list[int] | Literal["all"]:
        if layers != "all" and (not layers or sorted(set(layers)) != layers or layers[0] < 0):
            raise ValueError("`layers` must be ascending numbers from 0, each once, and at least one; or `all`")
        return layers

    def options(self) -> TelemetryOptions:
        """What the numbers depend on."""
        return TelemetryOptions.model_construct(**self.model_dump(exclude={"layers", "by"}))


def check_lists(config: TelemetryConfig, *, in_graphs: bool) -> None:
    """Refuse `by: lists` where telemetry is not computed on an accelerator.

    Raises:
        UnsupportedError: it is not.
    """
    if config.by == "lists" and not in_graphs:
        raise UnsupportedError(
            "`telemetry: {by: lists}` says what computes it on an accelerator, and this engine is on a CPU",
            fix="leave out `by`",
        )


def layers_of(config: TelemetryConfig, layers: int) -> list[int]:
    """Numbers of the layers that are measured, of a model with `layers`.

    Raises:
        ConfigError: a layer does not exist.
    """
    if config.layers == "all":
        return list(range(layers))
    if config.layers[-1] >= layers:
        raise ConfigError(
            f"`telemetry: layers` names layer {config.layers[-1]}; the model has {layers}, numbered from 0"
        )
    return config.layers
