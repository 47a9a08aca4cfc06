"""The YAML of `sglang-probe evict`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from sglang_probe.config import Config
from sglang_probe.errors import ConfigError
from sglang_probe.eviction.protocol import Protocol
from sglang_probe.harvest.config import Recording
from sglang_probe.paths import BUILT_IN_MODEL
from sglang_probe.policy.arm import Arm
from sglang_probe.run.hook_points import EMBED, RESID_POST
from sglang_probe.studies.evict.grid import Entry, Trivial, budget_name, entries_of, parse_budget
from sglang_probe.studies.evict.layers import SITES
from sglang_probe.workload.build import WorkloadConfig

Budget = Annotated[int | Fraction, BeforeValidator(parse_budget), PlainSerializer(budget_name)]


class Cut(Config):
    """How a text without a right answer becomes a task: its first tokens are the prompt, those behind the reference."""

    prompt_tokens: int = Field(default=192, ge=16)
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


class EvictionConfig(Config):
    """An eviction study: policies by budgets by protocols by tasks, offline and in the engine."""

    name: str | None = None
    model: str = BUILT_IN_MODEL
    dtype: str = "auto"
    workloads: dict[str, WorkloadConfig] = Field(min_length=1)
    """Tasks by name. Requests with right answers bring them; others need `cut`."""
    cut: Cut | None = None
    methods: list[str | dict[str, Any]] = Field(min_length=1)
    """Names, or `{method: snapkv, window: 8}`."""
    oracles: list[str | dict[str, Any]] = Field(default_factory=list)
    budgets: list[Budget] = Field(min_length=1)
    """Positions per kv head and layer (`64`), or shares of what is compressed (`1/8`)."""
    protocols: list[Protocol] = Field(default_factory=lambda: list(Protocol), min_length=1)
    trivial: Trivial = Trivial()
    """What protected random always keeps, and what metrics of candidates leave out."""
    controls_of: list[str] | None = None
    """Labels of the methods that the negative controls spoil; by default the first `snapkv`, if there is one."""
    layers: list[int] | None = None
    """Layers to capture and judge; None: all, which is what `in_engine` needs."""
    in_engine: bool = True
    decode: list[Decode] = Field(default_factory=lambda: [Decode()], min_length=1)
    teacher_forced: bool = True
    """Also decode the reference answers under every kept set, for the likelihood."""
    resamples: int = Field(default=10_000, ge=100)
    seed: int = 0
    server: dict[str, Any] = Field(default_factory=dict)
    concurrency: int = Field(default=32, ge=1)
    checkpoint_seconds: float = Field(default=60.0, gt=0)
    output: Path = Path("runs")

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
        return self

    @property
    def entries(self) -> list[Entry]:
        """Baseline, methods and oracles."""
        return entries_of(self.methods, self.oracles, self.trivial, self.seed)

    @property
    def controls(self) -> list[Entry]:
        """The methods that the negative controls spoil."""
        methods = [e for e in self.entries if e.kind == "method"]
        if self.controls_of is not None:
            return [e for e in methods if e.label in self.controls_of]
        return [e for e in methods if e.policy.name == "snapkv"][:1]

    @property
    def arm(self) -> Arm:
        """Cache on, nothing switched."""
        return Arm()

    def recording(self, task: str, layers: int) -> Recording:
        """What is recorded of a task under the full cache, on a model with so many layers."""
        chosen = range(layers) if self.layers is None else self.layers
        return self._recording(task, [EMBED, *(f"blocks.{y}.{site}" for y in chosen for site in SITES)])

    def bare(self, task: str, layers: int | None = None) -> Recording:
        """The same without captured rows; with those of the last of so many layers, for likelihoods."""
        return self._recording(task, [] if layers is None else [EMBED, f"blocks.{layers - 1}.{RESID_POST}"])

    def _recording(self, task: str, hook_points: list[str]) -> Recording:
        steps = 1 if self.cut is None else self.cut.steps
        return Recording(
            model=self.model,
            dtype=self.dtype,
            workload=self.workloads[task],
            sampling={"temperature": 0.0, "ignore_eos": True, "max_new_tokens": steps},
            hook_points=hook_points,
            server=self.server,
            concurrency=self.concurrency,
            checkpoint_seconds=self.checkpoint_seconds,
            output=self.output,
        )
