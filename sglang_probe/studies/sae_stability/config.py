"""The YAML of `sglang-probe sae stability`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from sglang_probe.config import Config, FolderName
from sglang_probe.harvest.config import WorkloadRecording, refuse_rows
from sglang_probe.policy.arm import Arm
from sglang_probe.run.hook_points import EMBED, parse_hook_point
from sglang_probe.sae.recipe import Recipe
from sglang_probe.studies.sae_train.config import Exclude

REPEAT, ORDER = "repeat", "order"


class Dictionary(Config):
    """What one dictionary is trained on."""

    of: str
    """Name of the arm."""
    rows: Literal["lineage", "computed"] = "lineage"
    """`lineage`: a position that was reused has the row of the request that computed it, so that a shared prefix counts
    as often as it was used: a harvest weighted by traffic. `computed`: cache hits are left out, a shared prefix counts
    once; rows of a list that every dictionary has take their place."""


class DictionariesOf(WorkloadRecording, Recipe):
    """What studies that train on their own recordings have in common."""

    name: FolderName | None = None
    """Name of the study's folder; by default the name of the YAML file."""
    hook_point: str
    """The rows to train on, e.g. `blocks.10.hook_resid_post`. It takes the place of `hook_points`; `hook_embed` is
    recorded with it."""
    exclude: Exclude = Exclude()
    """Attention sinks, of training and of evaluation."""
    latents: PositiveInt
    """Size of the dictionaries."""
    seeds: list[int] = Field(default_factory=lambda: [0, 1], min_length=2)
    """Of the initialisation: every dictionary is trained with each. Two seeds of one harvest are the seed floor."""
    order_seed: int = 0
    """Of the order of the rows, which all dictionaries share."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the families of requests that are judged by and not trained on."""

    @model_validator(mode="before")
    @classmethod
    def _one_hook_point(cls, data: Any) -> Any:
        if isinstance(data, dict) and "hook_points" in data:
            raise ValueError("`hook_points`: give the one `hook_point` that is trained on")
        if isinstance(data, dict) and isinstance(data.get("hook_point"), str):
            return {**data, "hook_points": list(dict.fromkeys([EMBED, data["hook_point"]]))}
        return data

    @field_validator("hook_point")
    @classmethod
    def _is_one(cls, name: str) -> str:
        return parse_hook_point(name).name

    @model_validator(mode="after")
    def _can_be_trained(self) -> DictionariesOf:
        refuse_rows(self)
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("`seeds` names one twice")
        if self.architecture in ("batchtopk", "topk") and self.k >= self.latents:
            raise ValueError(f"`k: {self.k:g}` is not less than `latents: {self.latents}`")
        return self

    @property
    def recipe(self) -> Recipe:
        """The part that says how one dictionary is trained."""
        return Recipe(**self.model_dump(include=set(Recipe.model_fields)))

    def trained(self) -> dict[str, Any]:
        """All that decides what is trained, beside the runs."""
        own = {"hook_point", "exclude", "latents", "seeds", "order_seed", "held_out"}
        return self.model_dump(mode="json", include=own | set(Recipe.model_fields))


class SaeStabilityConfig(DictionariesOf):
    """Records the same requests under several policies, and trains a dictionary on the rows of each."""

    arms: dict[FolderName, Arm] = Field(min_length=1)
    """The first is the reference: it samples, all others decode its tokens, and it is recorded twice."""
    dictionaries: dict[FolderName, Dictionary] | None = None
    """What is compared with the dictionary of the reference; default: one of each other arm, by `lineage`."""

    @model_validator(mode="after")
    def _dictionaries_are_of_arms(self) -> SaeStabilityConfig:
        reserved = {self.reference, REPEAT, ORDER}
        for name, dictionary in self.compared.items():
            if dictionary.of not in self.arms:
                raise ValueError(f"`dictionaries: {name}` is of `{dictionary.of}`, which is no arm")
            if name in reserved:
                raise ValueError(f"`dictionaries: {name}` has the name of one that is trained anyway")
        if not self.compared:
            raise ValueError("there is nothing to compare: give a second arm, or `dictionaries`")
        return self

    @property
    def reference(self) -> str:
        """The arm that all are compared with."""
        return next(iter(self.arms))

    @property
    def compared(self) -> dict[str, Dictionary]:
        """The dictionaries that are compared with the reference's."""
        if self.dictionaries is not None:
            return self.dictionaries
        return {name: Dictionary(of=name) for name in self.arms if name != self.reference}
