"""How an SAE is trained: what a YAML says of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from sglang_probe.config import Config

TRAINED = ("batchtopk", "topk", "jumprelu", "standard")


class Recipe(Config):
    """How a dictionary is trained. The defaults are those of a demonstration on a model of 135 million parameters."""

    architecture: Literal["batchtopk", "topk", "jumprelu", "standard"] = "batchtopk"
    """`batchtopk` is saved as `jumprelu` with one threshold, which is recalibrated on rows that were held out: its
    latents can be computed one by one, those of `topk` cannot."""
    k: PositiveFloat = 32
    """Latents that are active in a row, of `batchtopk` (on average) and `topk` (a whole number)."""
    sparsity: PositiveFloat | None = None
    """Weight of the sparsity loss: of `standard` the L1 coefficient (default 4), of `jumprelu` that of L0 (default 1).
    Rows are scaled to a mean norm of `sqrt(width)` first."""
    sparsity_warm_up: float = Field(default=0.1, ge=0, le=1)
    """Share of the training in which that weight rises to its value."""
    samples: PositiveInt = 700_000
    """Rows to train on, repeated ones counted each time."""
    batch_size: PositiveInt = 1024
    """Rows of one step."""
    lr: PositiveFloat = 1e-3
    """Learning rate of Adam."""
    lr_warm_up_steps: int = Field(default=20, ge=0)
    """Steps in which it rises."""
    lr_decay: float = Field(default=0.25, ge=0, lt=1)
    """Last share of the training, in which it falls to zero."""
    dead_after_steps: PositiveInt = 60
    """A latent that fired in none of so many steps counts as dead, and is revived (`batchtopk` and `topk` by AuxK,
    `jumprelu` by a loss on its pre-activation; SAELens has nothing for `standard`)."""
    revive: bool = True
    """Whether dead latents are revived."""

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.architecture == "topk" and self.k != int(self.k):
            raise ValueError(f"`k: {self.k:g}`: of `topk` it is a whole number")
        if self.samples < self.batch_size:
            raise ValueError(f"`samples: {self.samples}` is less than one batch of {self.batch_size}")
        if self.lr_warm_up_steps + round(self.lr_decay * self.steps) > self.steps:
            raise ValueError(
                f"`lr_warm_up_steps: {self.lr_warm_up_steps}` and the decay are longer than all {self.steps} steps"
            )
        return self

    @property
    def steps(self) -> int:
        """Whole batches in `samples`."""
        return self.samples // self.batch_size

    @property
    def batch_topk(self) -> bool:
        """Whether the threshold is recalibrated."""
        return self.architecture == "batchtopk"
