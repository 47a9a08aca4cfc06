"""`features.json`: what is known of single features of one SAE, and which of them may act on traffic.

One file per SAE, with a hash over everything that it says and the hash of the revision before it. A feature is a
`hypothesis` until causal evidence is entered, then it can be `validated`, then `deployed`; `retired` is for good. What
a status needs is checked whenever the file is read, so that one edited by hand is refused too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from sglang_probe.config import Config, parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.run import journal

Status = Literal["hypothesis", "validated", "deployed", "retired"]
NEXT: dict[str, tuple[str, ...]] = {
    "hypothesis": ("validated", "retired"),
    "validated": ("deployed", "hypothesis", "retired"),
    "deployed": ("validated", "retired"),
    "retired": (),
}
"""What each status may become. Deployment comes only after validation."""
LEAST_UNITS = 6
"""Texts or requests that evidence must rest on: no interval is given for fewer."""
_SHA256 = r"^[0-9a-f]{64}$"


class Evidence(Config):
    """What an intervention on the feature did, in a recorded run."""

    model_config = ConfigDict(allow_inf_nan=False)

    run: str = Field(min_length=1)
    """Name of the run."""
    manifest_sha256: str = Field(pattern=_SHA256)
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


class Labelled(Config):
    """Who gave the label."""

    by: Literal["human", "model"]
    name: str = Field(min_length=1)
    prompt_sha256: str | None = Field(default=None, pattern=_SHA256)
    """Of the prompt that a model was given."""

    @model_validator(mode="after")
    def _a_model_has_a_prompt(self) -> Labelled:
        if (self.by == "model") != (self.prompt_sha256 is not None):
            raise ValueError("a label by a model has the `prompt_sha256` of what it was asked, one by a human none")
        return self


class Feature(Config):
    """One latent of interest."""

    index: int = Field(ge=0)
    label: str = Field(min_length=1)
    labelled: Labelled
    owner: str = Field(min_length=1)
    rate: float | None = Field(default=None, ge=0, le=1)
    """Share of rows in which it fires."""
    percentile99: float | None = Field(default=None, gt=0)
    """Of its activation, over the rows in which it fires."""
    evidence: list[Evidence] = Field(default_factory=list)
    clamp: Clamp | None = None
    status: Status = "hypothesis"

    @model_validator(mode="after")
    def _has_what_its_status_needs(self) -> Feature:
        if self.status in ("validated", "deployed") and not any(e.shows_an_effect for e in self.evidence):
            raise ValueError(
                f"feature {self.index} cannot be `{self.status}`: no evidence of at least {LEAST_UNITS} texts has an "
                "interval past zero and past its control"
            )
        if self.status == "deployed" and self.clamp is None:
            raise ValueError(f"feature {self.index} cannot be `deployed`: `clamp` says what is done to it")
        return self


class FeatureManifest(Config):
    """What `features.json` holds."""

    version: Literal[1] = 1
    revision: int = Field(default=1, ge=1)
    previous: str | None = Field(default=None, pattern=_SHA256)
    """`sha256` of the revision before; null in the first."""
    model: str
    model_weight_hash: str = Field(pattern=_SHA256)
    """`sglang_probe.steering.library.weight_hash` of the model's files."""
    tokenizer_sha256: str | None = Field(default=None, pattern=_SHA256)
    hook_point: str
    sae_sha256: str = Field(pattern=_SHA256)
    """Of the SAE's weights."""
    training: dict[str, Any] = Field(default_factory=dict)
    """The SAE's own manifest (`sglang_probe.sae.manifest`): runs, mixture, evaluation."""
    features: list[Feature] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names_each_once(self) -> FeatureManifest:
        indices = [f.index for f in self.features]
        if twice := sorted({i for i in indices if indices.count(i) > 1}):
            raise ValueError(f"feature {twice[0]} is listed twice")
        if (self.revision == 1) != (self.previous is None):
            raise ValueError("the first revision has no `previous`, and every other has one")
        return self

    @property
    def sha256(self) -> str:
        """Over the canonical JSON of everything else in the file."""
        told = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(told.encode()).hexdigest()

    def feature(self, index: int) -> Feature:
        """A feature by its index.

        Raises:
            ConfigError: it is not listed.
        """
        found = [f for f in self.features if f.index == index]
        if not found:
            listed = ", ".join(str(f.index) for f in self.features) or "none"
            raise ConfigError(f"feature {index} is not in the manifest; it lists {listed}")
        return found[0]

    def moved(self, index: int, status: str) -> FeatureManifest:
        """The next revision, in which a feature has another status.

        Raises:
            ConfigError: the status cannot follow, or the feature lacks what it needs.
        """
        now = self.feature(index)
        if status not in NEXT[now.status]:
            raise ConfigError(
                f"feature {index} is `{now.status}` and cannot become `{status}`",
                fix=f"it can become {' or '.join(f'`{s}`' for s in NEXT[now.status]) or 'nothing else'}",
            )
        told = self.model_dump(mode="json")
        told |= {"revision": self.revision + 1, "previous": self.sha256}
        for f in told["features"]:
            if f["index"] == index:
                f["status"] = status
        return parse_config(told, FeatureManifest, where=f"feature {index} as `{status}`")

    def check_weights(self, weight_hash: str | None, *, where: str) -> None:
        """Refuse another model than the one that the manifest is of.

        Args:
            where: names the model or run at hand.

        Raises:
            ConfigError: its weights are others, or unknown.
        """
        if weight_hash != self.model_weight_hash:
            found = "unknown" if weight_hash is None else weight_hash[:12]
            raise ConfigError(
                f"the manifest is of `{self.model}` with weights {self.model_weight_hash[:12]}, and those of {where} "
                f"are {found}",
                fix="what is known of a feature does not carry over to other weights: validate it anew",
            )


def read_features(path: Path) -> FeatureManifest:
    """Read a manifest.

    Raises:
        ConfigError: it cannot be read, was changed without its hash, or a feature lacks what its status needs.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(told, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} is no manifest of features: {e}") from e
    stated = told.pop("sha256", None)
    found = parse_config(told, FeatureManifest, where=str(path))
    if stated != found.sha256:
        raise ConfigError(
            f"{path} was changed after it was written: its `sha256` is not that of what it says",
            fix="restore it from a copy, or write it by `sglang_probe.steering.features.write_features`",
        )
    return found


def write_features(manifest: FeatureManifest, path: Path) -> None:
    """Write a manifest with its hash; a reader sees the old file or the whole new one.

    Raises:
        ConfigError: a manifest is there, and this is not the revision that follows it.
    """
    if path.exists() and manifest.previous != read_features(path).sha256:
        raise ConfigError(
            f"{path} has another revision than the one that this follows", fix="read it again, and change that"
        )
    told = {**manifest.model_dump(mode="json"), "sha256": manifest.sha256}
    journal.write_text_durably(path, json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
