"""The YAML of `sglang-probe sae train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from sglang_probe.config import Config, FolderName, InputPath
from sglang_probe.harvest.config import HarvestConfig
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


class Streamed(HarvestConfig):
    """What is recorded for a training whose rows are not kept. Keys as of `sglang-probe harvest`."""

    requests: PositiveInt = 256
    """Requests that are recorded at a time, trained on and forgotten. Each time the prefix cache begins empty."""
    buffer_rows: PositiveInt = 500_000
    """Rows in memory, within which they are shuffled. A workload that fits is served once; a larger one is served again
    as often as `samples` asks."""


class SaeTrainConfig(Recipe):
    """Trains sparse autoencoders on the rows of recorded runs. `hook_point`, `latents` and `runs` (or `harvest`) are
    needed."""

    name: FolderName | None = None
    """Folder of the results in `output`; default: the name of the YAML."""
    output: Path = Path("saes")
    """Where that folder is made. Relative to the working directory."""
    runs: list[InputPath] = Field(default_factory=list)
    """Run directories, or closed segments of a live recording."""
    harvest: Streamed | None = None
    """In place of `runs`: rows go from the engine to the training and are not kept."""
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
    """Leave out a position if the same so many tokens ended at an earlier one (with `harvest`: of the requests that are
    recorded together), e.g. 32; 0: do not."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the families of requests that are judged by and not trained on."""
    buffer_mib: PositiveInt = 1024
    """Memory for the rows of `runs` that are trained on, in MiB. Rows that fit are read once and shuffled all together;
    of more, random pieces are read and shuffled so many at a time, each row once an epoch. Another size is then another
    order. Beside it are in memory `evaluation_rows`, and about 100 bytes for what is known of each row."""
    evaluate_on: list[InputPath] = Field(default_factory=list)
    """Runs to judge by in place of held-out families."""
    most_rows: PositiveInt | None = None
    """Most rows to train on, of one family after another; what is held out stays the same. For the question whether a
    larger harvest would help: train on a half of this one."""
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
    def _rows_come_from_somewhere(self) -> SaeTrainConfig:
        if bool(self.runs) == (self.harvest is not None):
            raise ValueError("give `runs`, or `harvest` for rows that are not kept")
        if self.harvest is not None and self.most_rows is not None:
            raise ValueError("`most_rows` is of recorded `runs`: with `harvest`, serve fewer requests")
        if self.harvest is not None and (given := {"hook_points", "name", "output"} & self.harvest.model_fields_set):
            raise ValueError(f"`harvest: {min(given)}` has no meaning here: rows are of `hook_point`, and are not kept")
        if self.harvest is not None and self.harvest.withhold is not None:
            raise ValueError(
                "`harvest: {withhold}` cannot be had here: rows go into the training as they are computed, before "
                "anything is taken out. Record a run with `sglang-probe harvest` and `withhold`, and give it under "
                "`runs` in place of `harvest`"
            )
        return self

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
        """All that decides what is trained, as plain data; runs are named by their manifests instead, and a harvest by
        its digest, because neither path nor text of a user belongs into a dictionary. The buffer is told in rows, where
        it is smaller than they are."""
        elsewhere = {"name", "output", "runs", "harvest", "evaluate_on", "weight", "buffer_mib"}
        return self.model_dump(mode="json", exclude=elsewhere)
