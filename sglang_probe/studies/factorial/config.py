"""The YAML of `sglang-probe factorial`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sglang_probe.config import FolderName
from sglang_probe.harvest.config import WorkloadRecording, refuse_ends
from sglang_probe.run.hook_points import EMBED, QUERY, ROTATED_KEY, ROTATED_QUERY, VALUE
from sglang_probe.run.selection import RowsConfig
from sglang_probe.studies.factorial.study import FactorialOptions
from sglang_probe.workload.build import WorkloadConfig
from sglang_probe.workload.documents import Documents


class FactorialConfig(WorkloadRecording):
    """A factorial study."""

    name: FolderName | None = None
    """Name of the study's folder; by default the name of the YAML file."""
    workload: WorkloadConfig = Field(default_factory=Documents)
    """Where the prompts come from; by default excerpts of Python's standard library."""
    layers: list[int] = Field(min_length=1)
    """Layers whose queries, keys and values are captured."""
    pseudo_tokens: int = Field(default=32, ge=2)
    """N: pseudo tokens of a cell, and decode steps that their queries are compared with."""
    decode_steps: int = Field(default=64, ge=2)
    """Steps of the real decoding, whose attention is the truth that the cells should predict."""
    sampling: dict[str, Any] = Field(default_factory=lambda: {"temperature": 0.0})
    """Sampling of the real decoding."""
    resampling: dict[str, Any] = Field(default_factory=lambda: {"temperature": 1.0})
    """Sampling of the second continuation."""
    first_tokens: int = Field(default=4, ge=0)
    """For content `prompt`: this many of the prompt's first tokens; the rest are from its end."""
    filler: str = "Sorry, I do not know the answer to that. "
    """The sentence whose tokens are content `filler`, repeated as needed."""
    window: int = Field(default=8, ge=1)
    """Last prompt positions that every kept set holds and that no measure counts."""
    sinks: int = Field(default=4, ge=0)
    """First prompt positions, likewise."""
    budgets: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=lambda: [0.125, 0.25], min_length=1)
    """Kept shares of the prompt. The first is that of the evictions."""
    evict_positions: list[Literal["true", "+1", "+8", "+32", "+128", "zero"]] = Field(default_factory=list)
    """Decode once more after evicting by the cells of these positions; empty: no eviction. Needs all `layers`."""
    evict_steps: int = Field(default=32, ge=2)
    """Tokens of the real decoding that are forced there."""

    @property
    def options(self) -> FactorialOptions:
        """What the study must know of the runs."""
        return FactorialOptions(self.pseudo_tokens, self.window, self.sinks, tuple(self.budgets))

    @field_validator("evict_positions", mode="before")
    @classmethod
    def _yaml_reads_true_as_a_boolean(cls, values: Any) -> Any:
        return ["true" if v is True else v for v in values] if isinstance(values, list) else values

    @model_validator(mode="before")
    @classmethod
    def _points_of_layers(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("layers"), list):
            return data
        if "hook_points" in data:
            raise ValueError("`layers` says what is captured; leave `hook_points` out")
        sites = (QUERY, ROTATED_QUERY, ROTATED_KEY, VALUE)
        return {**data, "hook_points": [EMBED, *(f"blocks.{i}.{s}" for i in data["layers"] for s in sites)]}

    @model_validator(mode="after")
    def _steps_cover_the_pseudo_tokens(self) -> FactorialConfig:
        if self.decode_steps < self.pseudo_tokens:
            raise ValueError("`decode_steps` must be at least `pseudo_tokens`, whose queries they are compared with")
        return self

    @model_validator(mode="after")
    def _can_be_read(self) -> FactorialConfig:
        refuse_ends(self.sampling, "decode_steps")
        refuse_ends(self.resampling, "decode_steps")
        if self.rows != RowsConfig():
            raise ValueError("this study reads all positions and heads of its layers: leave `rows` out")
        if self.telemetry is not None and self.evict_positions:
            raise ValueError("evictions cannot be served with `telemetry`: leave it or `evict_positions` out")
        return self
