"""What an intervention did in a recorded run, and of what that was measured."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from sglang_probe.config import Config

LEAST_UNITS = 6
"""Texts or requests that evidence must rest on: no interval is given for fewer."""
SHA256 = r"^[0-9a-f]{64}$"


class Measured(Config):
    """What intervened: by which vector, how, and how much. Evidence says nothing of another."""

    model_config = ConfigDict(allow_inf_nan=False)

    sha256: str | None = Field(default=None, pattern=SHA256)
    """Of a direction, its hash in the library."""
    feature: int | None = Field(default=None, ge=0)
    """Of a feature, its index."""
    sae_sha256: str | None = Field(default=None, pattern=SHA256)
    """Of a feature, the weights of its SAE."""
    mode: str
    value: float | None = None
    """As in `clamp`; null where the mode has none."""

    @model_validator(mode="after")
    def _is_of_one(self) -> Measured:
        feature = (self.feature is not None, self.sae_sha256 is not None)
        if feature != ((self.sha256 is None),) * 2:
            raise ValueError("`of` names a direction by its `sha256`, or a `feature` with its `sae_sha256`")
        return self


class Evidence(Config):
    """What an intervention by the feature or direction did, in a recorded run."""

    model_config = ConfigDict(allow_inf_nan=False)

    run: str = Field(min_length=1)
    """Name of the run."""
    manifest_sha256: str = Field(pattern=SHA256)
    """Of its manifest: which run that is."""
    measure: str = Field(min_length=1)
    """What the effect is of, with its unit, e.g. `log-odds of the target, nats`."""
    dose: float
    unit: Literal["absolute", "mean_norm", "p99"]
    effect: float
    low: float
    high: float
    """Ends of the 95 % interval of the effect."""
    control: float
    """The effect of a random direction, or feature, at the same dose."""
    side_effect: float = Field(ge=0)
    """KL from the plain model on texts out of scope, nats per token."""
    n: int = Field(ge=1)
    """Texts or requests that are independent of each other."""
    of: Measured | None = None
    """What it was measured of. Evidence that does not say so (of earlier releases) lets nothing act."""

    @model_serializer(mode="wrap")
    def _without_what_it_does_not_say(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The hash of a file from before there was `of` stays what it was.
        told: dict[str, Any] = write(self)
        return told if self.of is not None else {k: v for k, v in told.items() if k != "of"}

    @model_validator(mode="after")
    def _is_an_interval(self) -> Evidence:
        if not self.low <= self.effect <= self.high:
            raise ValueError(f"the effect {self.effect:g} is not within its interval [{self.low:g}, {self.high:g}]")
        return self

    @property
    def shows_an_effect(self) -> bool:
        """Whether the interval holds neither zero nor the control's effect nor anything between the two."""
        if self.n < LEAST_UNITS:
            return False
        return self.low > max(0.0, self.control) or self.high < min(0.0, self.control)
