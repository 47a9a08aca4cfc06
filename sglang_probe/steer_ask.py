"""One intervention as a request writes it: a vector of the library, what is done with it, how much, and where.

Only what can be told without the library is checked here; `steering/spec.py` does the rest.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr, model_validator

from sglang_probe.config import Config

Op = Literal["add", "project_out", "ablate_feature", "clamp", "cap", "splice"]
Unit = Literal["absolute", "mean_norm", "p99"]
Phase = Literal["prefill", "decode"]

MOST = 16
"""Interventions of one request: each is one more pass over its rows."""
_MOST_EXCLUDED = 256
_FRACTIONS = ("project_out", "ablate_feature", "splice")
"""Operations whose strength is a part of what could be taken; 1 takes all."""


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("give a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        finite = False
    if not finite:
        raise ValueError("give a finite number")
    return value


class Gate(Config):
    """When a row is changed at all, besides its place."""

    by: Literal["feature", "probe"]
    """`feature`: only where the feature itself is active, past its own threshold. `probe`: of the generated tokens, all
    or none, as the score of the prompt's last row says."""
    probe: StrictStr | None = Field(default=None, min_length=1)
    """`by: probe`: name of a probe of the library. The gate opens above its threshold. One probe for a request."""
    active: StrictBool = False
    """`by: probe`: of these tokens only those on which the feature itself is active, as `by: feature` has it."""

    @model_validator(mode="after")
    def _named(self) -> Gate:
        if (self.by == "probe") != (self.probe is not None):
            raise ValueError("`probe` names the probe of a gate `by: probe`, and of no other")
        if self.active and self.by != "probe":
            raise ValueError("`active` adds to a gate `by: probe` what `by: feature` says already")
        return self

    @property
    def by_feature(self) -> bool:
        """Whether rows are left alone on which the feature is not active."""
        return self.by == "feature" or self.active


class Steer(Config):
    """One intervention of a request. Windows are half-open; positions of the prompt count from 0, or from its end if
    negative; step 1 of the generation is the forward pass whose input is the first generated token."""

    vector: StrictStr = Field(min_length=1)
    """Name of an entry of the library."""
    op: Op = "add"
    """`add` the direction; `project_out` the residual's part along it; `ablate_feature`: take the feature's
    contribution away and keep the reconstruction's error; `clamp` the activation to a value; `cap`: at most a value;
    `splice`: an SAE's reconstruction in place of the residual."""
    strength: Annotated[float, BeforeValidator(_number)] | None = None
    """`add`: length of what is added. `clamp`, `cap`: the activation. Elsewhere a fraction, 1 by default."""
    unit: Unit = "absolute"
    """`absolute`; `mean_norm`: times the layer's mean norm of the residual; `p99`: times the feature's own 99th
    percentile. Both are in the vector's card."""
    phases: tuple[Phase, ...] = Field(default=("prefill", "decode"), min_length=1, max_length=2)
    """Positions of the prompt, of the generated tokens, or both."""
    prompt_window: tuple[StrictInt, StrictInt | None] | None = None
    """`[first, end]` of the prompt's positions, e.g. `[-1, null]` for the last one; by default all."""
    generation_window: tuple[StrictInt, StrictInt | None] | None = None
    """`[first, end]` of the generation's steps, from 1; by default all."""
    exclude: tuple[Annotated[StrictInt, Field(ge=0)], ...] = Field(default=(), max_length=_MOST_EXCLUDED)
    """Positions of the sequence that are left alone, e.g. `[0]`."""
    gate: Gate | None = None
    """When a row is changed at all, besides its place; by default always."""
    random_error: Annotated[StrictInt, Field(ge=0, lt=1 << 31)] | None = None
    """Of `splice`, the control: the error of the reconstruction is turned into a random direction, with its length
    kept. The direction follows from this number and the position."""

    @model_validator(mode="after")
    def _fits(self) -> Steer:
        if self.strength is None and self.op not in _FRACTIONS:
            raise ValueError(f"`{self.op}` needs a `strength`")
        if self.op in _FRACTIONS:
            if self.unit != "absolute":
                raise ValueError(f"the strength of `{self.op}` is a fraction: leave `unit` out")
            if not 0 <= self.fraction <= 2:
                raise ValueError(f"the strength of `{self.op}` is a fraction from 0 to 2")
        if self.random_error is not None and self.op != "splice":
            raise ValueError(f"`random_error` has no meaning for `{self.op}`")
        if self.gate is not None and self.gate.by_feature and self.op not in ("add", "clamp"):
            raise ValueError(f"a gate by the feature has no meaning for `{self.op}`")
        if self.gate is not None and self.gate.by == "probe" and set(self.phases) != {"decode"}:
            raise ValueError(
                "a gate by a probe is decided on the prompt's last row, which earlier ones cannot wait for: say "
                "`phases: [decode]`"
            )
        for phase, name in (("prefill", "prompt_window"), ("decode", "generation_window")):
            if getattr(self, name) is not None and phase not in self.phases:
                raise ValueError(f"`{name}` has no effect without `{phase}` among the `phases`")
        if self.prompt_window is not None:
            _check_order("prompt_window", *self.prompt_window)
        if self.generation_window is not None:
            first, end = self.generation_window
            if first < 1:
                raise ValueError("steps of `generation_window` count from 1")
            if end is not None and end < 1:
                raise ValueError("steps of `generation_window` count from 1; null is their end")
            _check_order("generation_window", first, end)
        return self

    @property
    def fraction(self) -> float:
        """Strength of an operation that takes a fraction."""
        return 1.0 if self.strength is None else self.strength


def _check_order(name: str, first: int, end: int | None) -> None:
    if not -(1 << 31) < first < 1 << 31 or (end is not None and not -(1 << 31) < end < 1 << 31):
        raise ValueError(f"`{name}`: [{first}, {end}] is no range of positions")
    if end is not None and (first >= 0) == (end >= 0) and end <= first:
        raise ValueError(f"`{name}`: [{first}, {end}] is empty; windows are half-open, and null is the end")
