"""The YAML of `sglang-probe harvest`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from sglang_probe.config import Config
from sglang_probe.errors import ConfigError
from sglang_probe.paths import BUILT_IN_MODEL
from sglang_probe.policy.arm import Arm
from sglang_probe.run.hook_points import EMBED, parse_hook_point
from sglang_probe.run.selection import RowsConfig, Selected
from sglang_probe.run.telemetry_options import TelemetryConfig
from sglang_probe.workload.build import WorkloadConfig


class Recording(Config):
    """What a harvest and an experiment have in common: model, workload, and what to record."""

    model: str = BUILT_IN_MODEL
    """`probe-text` or `probe-recall` (built in), a local path, or a hub id."""
    dtype: str = "auto"
    workload: WorkloadConfig
    sampling: dict[str, Any] = Field(default_factory=lambda: {"max_new_tokens": 32, "temperature": 0.0})
    """Default sampling parameters; a request may carry its own."""
    hook_points: list[str] = Field(default_factory=lambda: [EMBED])
    """Rows to capture. `hook_embed` lets every row's owner be proved; leave it in. `[]` records the ledger alone."""
    accelerator: Literal["refused", "unproved"] = "refused"
    """Whether rows may be captured on a GPU, where that has not been proved (docs/gpu.md)."""
    rows: RowsConfig = RowsConfig()
    """Which positions and heads rows are kept for, e.g. `{window: 32, decode: {every: 4}}`; by default all."""
    telemetry: TelemetryConfig | None = None
    """Attention statistics of decode steps, e.g. `{every: 4, top_k: 8}`; `{}` for the defaults, absent for none."""
    server: dict[str, Any] = Field(default_factory=dict)
    """SGLang server arguments, e.g. `chunked_prefill_size: 256`."""
    concurrency: int = Field(default=16, ge=1)
    """Requests in flight at once."""
    checkpoint_seconds: float = Field(default=20.0, gt=0)
    """How often what is known is made durable: the most work that a crash can cost."""
    output: Path = Path("runs")
    """Folder in which the run directory is made."""

    @field_validator("hook_points")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            parse_hook_point(name)
        return list(dict.fromkeys(names))


def refuse_rows(config: Recording) -> None:
    """Refuse `rows` that keep some positions in a study that compares all of them, before anything is served.

    Raises:
        ValueError: a hook point would not hold every position.
    """
    if partial := Selected(config.rows, config.hook_points).partial:
        raise ValueError(f"this study reads all positions, and `rows` keeps some of `{partial[0]}`: leave it out")


R = TypeVar("R", bound=Recording)


def with_skip_bad(config: R, skip_bad: bool) -> R:
    """The configuration, reading past malformed lines if `skip_bad`.

    Raises:
        ConfigError: the workload is not read from a file.
    """
    if not skip_bad:
        return config
    if "skip_bad" not in type(config.workload).model_fields:
        raise ConfigError(f"`--skip-bad` has no meaning for a `{config.workload.source}` workload: it reads no file")
    return config.model_copy(update={"workload": config.workload.model_copy(update={"skip_bad": True})})


class HarvestConfig(Recording):
    """One run under one arm."""

    name: str | None = None
    """Name of the run directory; by default the name of the YAML file."""
    arm: Arm = Arm()


class ExperimentConfig(Recording):
    """Several arms over the same requests with the same output tokens."""

    name: str | None = None
    """Name of the experiment's folder; by default the name of the YAML file."""
    arms: dict[str, Arm] = Field(
        default_factory=lambda: {"cache_on": Arm(), "cache_off": Arm(cache="off")}, min_length=2
    )
    """The first arm samples; the decode of all others is forced to its tokens. Each name is a run's folder."""
    replicates: int = Field(default=2, ge=1)
    """How often each arm runs: the difference of an arm to itself is the floor beside every effect."""
    order_seed: int = 0
    """Of the order of the arms within each replicate."""
    baseline: str | None = None
    """The arm that the others are compared with; by default the first."""
    margin: float = Field(default=1e-3, gt=0)
    """By how much relative L2 an effect may exceed the floor and still be called equivalent; stated beforehand."""
    force_outputs: bool = True
    """False: every arm samples its own outputs, and what is compared ends where they part."""

    @model_validator(mode="after")
    def _baseline_is_an_arm(self) -> ExperimentConfig:
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"`baseline: {self.baseline}` is no arm; arms: {', '.join(self.arms)}")
        return self

    @model_validator(mode="after")
    def _compares_all_positions(self) -> ExperimentConfig:
        refuse_rows(self)
        return self
