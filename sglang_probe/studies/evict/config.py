"""The YAML of `sglang-probe evict`."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from sglang_probe.config import Config, FolderName
from sglang_probe.errors import ConfigError
from sglang_probe.eviction.protocol import Protocol
from sglang_probe.harvest.config import Recording
from sglang_probe.run.hook_points import EMBED
from sglang_probe.studies.evict.grid import (
    Entry,
    Protection,
    Trivial,
    budget_name,
    entries_of,
    parse_budget,
)
from sglang_probe.studies.evict.layers import SITES
from sglang_probe.workload.build import WorkloadConfig

Budget = Annotated[int | Fraction, BeforeValidator(parse_budget), PlainSerializer(budget_name)]


class Cut(Config):
    """How a text without a right answer becomes a task: its first tokens are the prompt, those after the reference."""

    prompt_tokens: int = Field(default=192, ge=16)
    """Length of each prompt, from the beginning of its text."""
    question_tokens: int = Field(default=16, ge=1)
    """Last tokens of the prompt that the query-hidden protocol reads from the compressed cache."""
    steps: int = Field(default=32, ge=2)
    """Tokens that are generated, and tokens of the text that are the reference."""

    @model_validator(mode="after")
    def _leaves_a_context(self) -> Cut:
        if self.question_tokens >= self.prompt_tokens:
            raise ValueError("`question_tokens` leaves no context of the prompt")
        return self


class Decode(Config):
    """How outputs are sampled in the engine."""

    temperature: float = Field(default=0.0, ge=0)
    """0: greedy."""
    repeats: int = Field(default=1, ge=1)
    """Samples of each request; the mean over them is the request's result."""

    @property
    def name(self) -> str:
        """`greedy`, or `t0.7`."""
        return f"t{self.temperature:g}" if self.temperature else "greedy"

    @model_validator(mode="after")
    def _greedy_once(self) -> Decode:
        if not self.temperature and self.repeats > 1:
            raise ValueError("greedy outputs repeat themselves: leave `repeats` out")
        return self


SETTLED = {
    "workload": "tasks have names: give `workloads`",
    "sampling": "outputs are sampled as `decode` says, and as long as the right answers or the `cut`",
    "hook_points": "the methods need queries, keys and values; `layers` says of which layers",
    "rows": "methods choose among all positions and heads",
    "resamples": "intervals draw nothing at random",
    "telemetry": "it reads every cached key, and a request with a kept set attends to some of them",
}
"""Fields of a recording that an eviction study settles itself."""
_SHARED = Recording.model_fields.keys() - SETTLED.keys()
_OF_THE_GRID = {
    *("workloads", "cut", "methods", "oracles", "budgets", "protocols"),
    *("trivial", "protect", "as_published", "controls_of", "layers", "in_engine", "needed", "seed"),
}


class EvictionConfig(Recording):
    """An eviction study: policies by budgets by protocols by tasks, offline and in the engine."""

    name: FolderName | None = None
    """Name of the study's folder; by default the name of the YAML file."""
    workloads: dict[FolderName, WorkloadConfig] = Field(min_length=1)
    """Tasks by name. Requests with right answers bring them; others need `cut`."""
    cut: Cut | None = None
    """For texts without right answers: how long a prompt and its continuation are."""
    methods: list[str | dict[str, Any]] = Field(min_length=1)
    """Names, or `{method: snapkv, window: 8}`. With `per_query_head: true` every query head keeps a set of its own, as
    the authors of SnapKV and LAQ do; judged offline, because the engine has one set for each kv head."""
    oracles: list[str | dict[str, Any]] = Field(default_factory=list)
    """Policies that know the future, as upper bounds; written like `methods`."""
    budgets: list[Budget] = Field(min_length=1)
    """Positions per kv head and layer (`64`), or shares of what is compressed (`1/8`)."""
    protocols: list[Protocol] = Field(default_factory=lambda: list(Protocol), min_length=1)
    """Whether the question belongs to the prompt that is compressed."""
    trivial: Trivial = Trivial()
    """Sinks and last positions that metrics of candidates leave out."""
    protect: Protection | None = None
    """First and last positions that every policy always keeps; by default those of `trivial`."""
    as_published: bool = True
    """Also run every method with the always-kept set that it is given here or in its paper; false: on equal terms
    alone, for half of the work."""
    controls_of: list[str] | None = None
    """Labels of the methods that the negative controls spoil; by default the first `snapkv`, if there is one."""
    layers: list[int] | None = None
    """Layers to capture and judge; by default all, which is what `in_engine` needs."""
    in_engine: bool = True
    """Also generate from every kept set in the engine; false: offline metrics alone."""
    needed: bool = False
    """Also find by removal which positions each answer needs (`needed.parquet`): by `transformers` on the CPU in
    float32, before the engine is started. Needs right answers."""
    decode: list[Decode] = Field(default_factory=lambda: [Decode()], min_length=1)
    """How outputs are generated from the compressed caches; each entry generates once more."""
    teacher_forced: bool = True
    """Also decode the reference answers under every kept set, for the likelihood."""
    seed: int = 0
    """Seed of everything random: random policies, controls, bootstrap."""
    concurrency: int = Field(default=32, ge=1)
    """Requests in flight at once."""
    checkpoint_seconds: float = Field(default=60.0, gt=0)
    """How often what is known is made durable: the most work that a crash can cost."""

    @model_validator(mode="before")
    @classmethod
    def _settles_what_is_recorded(cls, data: Any) -> Any:
        for key, why in SETTLED.items():
            if isinstance(data, dict) and key in data:
                raise ValueError(f"`{key}` has no meaning in an eviction study: {why}")
        return data

    @field_validator("budgets")
    @classmethod
    def _different(cls, budgets: list[Budget]) -> list[Budget]:
        names = [budget_name(b) for b in budgets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"budget `{name}` is listed twice")
        return budgets

    @field_validator("decode")
    @classmethod
    def _once_each(cls, decode: list[Decode]) -> list[Decode]:
        if len({d.name for d in decode}) < len(decode):
            raise ValueError("two entries have the same temperature")
        return decode

    @model_validator(mode="after")
    def _consistent(self) -> EvictionConfig:
        try:
            entries = self.entries
        except ConfigError as e:
            raise ValueError(str(e)) from None
        for label in self.controls_of or []:
            if label not in [e.label for e in entries if e.kind == "method"]:
                raise ValueError(f"`controls_of: {label}` is no method of this study")
        if self.in_engine and self.layers is not None:
            raise ValueError("`in_engine` needs kept sets of all layers: leave `layers` out")
        if self.needed and self.cut is not None:
            raise ValueError("`needed` asks what right answers need, and texts that are `cut` have none")
        return self

    @property
    def protection(self) -> Protection:
        """What every policy always keeps."""
        return self.protect or Protection(sinks=self.trivial.sinks, recent=self.trivial.window)

    @property
    def entries(self) -> list[Entry]:
        """Baseline, methods and oracles under one protection, and methods as they are given."""
        return entries_of(
            self.methods,
            self.oracles,
            self.trivial,
            self.seed,
            protect=self.protection,
            as_published=self.as_published,
        )

    @property
    def controls(self) -> list[Entry]:
        """The methods that the negative controls spoil."""
        methods = [e for e in self.entries if e.kind == "method"]
        if self.controls_of is not None:
            return [e for e in methods if e.label in self.controls_of]
        return [e for e in methods if e.policy.name == "snapkv"][:1]

    @property
    def decodes(self) -> list[tuple[str, Decode, bool]]:
        """Ways of decoding in the engine: name, sampling, and whether the reference is forced."""
        out = [(d.name, d, False) for d in self.decode]
        return [*out, ("forced", Decode(), True)] if self.teacher_forced else out

    @property
    def grid(self) -> dict[str, Any]:
        """What the offline tables and the kept sets depend on, beyond what the manifests of the runs say."""
        return self.model_dump(mode="json", include=_OF_THE_GRID)

    def recording(self, layers: int) -> Recording:
        """What is recorded under the full cache, on a model with so many layers."""
        chosen = range(layers) if self.layers is None else self.layers
        return Recording(
            sampling={
                "temperature": 0.0,
                "ignore_eos": True,
                "max_new_tokens": 1 if self.cut is None else self.cut.steps,
            },
            hook_points=[EMBED, *(f"blocks.{y}.{site}" for y in chosen for site in SITES)],
            **{name: getattr(self, name) for name in _SHARED},
        )
