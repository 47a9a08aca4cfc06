"""The YAML of `sglang-probe sae train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from sglang_probe.config import Config, FolderName, InputPath
from sglang_probe.run.hook_points import parse_hook_point
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.recipe import Recipe


class Exclude(Config):
    """Rows that are left out as attention sinks, of training and of evaluation. How many is in the report."""

    first_positions: int = Field(default=1, ge=0)
    """Positions at the start of every request."""
    norm_multiple: float | None = Field(default=10.0, gt=1)
    """Rows whose norm is more than so many times the median; null: none."""

    def sinks(self) -> Sinks:
        """What the library takes."""
        return Sinks(self.first_positions, self.norm_multiple)


class SaeTrainConfig(Recipe):
    """Trains sparse autoencoders on the rows of recorded runs. `runs`, `hook_point` and `latents` are needed."""

    name: FolderName | None = None
    """Folder of the results in `output`; default: the name of the YAML."""
    output: Path = Path("saes")
    """Where that folder is made. Relative to the working directory."""
    runs: list[InputPath] = Field(min_length=1)
    """Run directories, or closed segments of a live recording."""
    hook_point: str
    """The rows to train on, e.g. `blocks.10.hook_resid_post`."""
    where: str | None = None
    """Which positions: a pandas query over the columns of `run.tokens()`, e.g. `segment != 'system'`."""
    weight: Literal["unique", "traffic"] | InputPath = "unique"
    """`unique`: every captured row once; `traffic`: as often as its position was used; or a weights file of
    `sglang-probe coverage`."""
    mix: dict[Literal["prefill", "decode", "recompute"], float] | None = None
    """Share of each phase, e.g. `{prefill: 0.5, decode: 0.5}`; default: as they were recorded."""
    exclude: Exclude = Exclude()
    """Attention sinks."""
    deduplicate: int = Field(default=0, ge=0)
    """Leave out a position if the same so many tokens ended at an earlier one, e.g. 32; 0: do not."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the families of requests that are judged by and not trained on."""
    evaluate_on: list[InputPath] = Field(default_factory=list)
    """Runs to judge by in place of held-out families."""
    evaluation_rows: PositiveInt = 40_000
    """Most rows to judge by."""
    latents: list[PositiveInt] = Field(min_length=1)
    """Sizes of the dictionary; each is trained."""
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    """Of the initialisation; each is trained, on the same batches."""
    order_seed: int = 0
    """Of the order of the rows."""
    store: Literal["float32", "bfloat16"] = "float32"
    """How matrices are stored. What is stored is what is judged."""
    checkpoint_every: PositiveInt = 200
    """Steps after which `--resume` can go on."""

    @field_validator("hook_point")
    @classmethod
    def _known(cls, name: str) -> str:
        return parse_hook_point(name).name

    @model_validator(mode="after")
    def _dictionaries(self) -> SaeTrainConfig:
        for name in ("latents", "seeds"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"`{name}` names one twice")
        if self.architecture in ("batchtopk", "topk") and self.k >= min(self.latents):
            raise ValueError(f"`k: {self.k:g}` is not less than `latents: {min(self.latents)}`")
        return self

    @property
    def recipe(self) -> Recipe:
        """The part that says how one dictionary is trained."""
        return Recipe(**self.model_dump(include=set(Recipe.model_fields)))

    def identity(self) -> dict[str, Any]:
        """All that decides what is trained, as plain data; runs are named by their manifests instead."""
        return self.model_dump(mode="json", exclude={"name", "output", "runs", "evaluate_on", "weight"})
