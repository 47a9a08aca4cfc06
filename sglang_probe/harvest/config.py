"""What every recording is told, and the YAML of `sglang-probe harvest`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator

from sglang_probe.config import Config, FolderName, InputPath, beside
from sglang_probe.errors import ConfigError
from sglang_probe.harvest.families import Order
from sglang_probe.paths import BUILT_IN_MODEL, BUILT_IN_MODELS
from sglang_probe.policy.arm import Arm
from sglang_probe.privacy.rule import Withhold
from sglang_probe.remote.config import UploadConfig
from sglang_probe.run.hook_points import EMBED, parse_pattern
from sglang_probe.run.selection import RowsConfig, Selected, expanded
from sglang_probe.run.telemetry_options import TelemetryConfig
from sglang_probe.steering.config import ScoresConfig, SteerConfig
from sglang_probe.workload.build import WorkloadConfig


class Recording(Config):
    """What a harvest and every study have in common: the model, how it is served, and what is recorded."""

    hints: ClassVar[Mapping[str, str]] = {
        "accelerator": "rows on a GPU need a certificate of `sglang-probe prove`, which is found without a key"
    }

    model: str = BUILT_IN_MODEL
    """A name of `sglang-probe model list` (`probe-text`, `smollm2-135m`), a local path (in a YAML file relative to it),
    or a hub id."""
    dtype: str = "auto"
    """`bfloat16`, `float16` or `float32`; `auto` takes that of the checkpoint."""
    sampling: dict[str, Any] = Field(default_factory=lambda: {"max_new_tokens": 32, "temperature": 0.0})
    """Default sampling parameters; a request may carry its own."""
    hook_points: list[str] = Field(default_factory=lambda: [EMBED])
    """Rows to capture. Keep `hook_embed`: it proves which token each row belongs to. `[]` records the ledger alone.
    `blocks.*.hook_resid_post` is of every layer; `blocks.{4..12}.`, `blocks.{0..28..4}.`, `blocks.{0,5}.` of some."""
    certificate: Literal["auto"] | InputPath = "auto"
    """On a GPU rows, telemetry and interventions need a certificate of `sglang-probe prove` for this configuration on
    this machine: `auto` finds it in the cache folder, or name the file. A CPU needs none."""
    simulated_graphs: bool = False
    """For the probe's own tests, on a CPU: rows leave the model as they would leave a graph. There are no graphs."""
    rows: RowsConfig = RowsConfig()
    """Which positions and heads rows are kept for, e.g. `{window: 32, decode: {every: 4}}`; by default all."""
    scores: ScoresConfig | None = None
    """What `blocks.<layer>.hook_scores` among the `hook_points` are of: `{library: FOLDER}`, whose probes have a column
    each. A score is written instead of a row; `run.scores()` reads them."""
    telemetry: TelemetryConfig | None = None
    """Attention statistics of decode steps, e.g. `{every: 4, top_k: 8}`; `{}` for the defaults, absent for none."""
    steer: SteerConfig | None = None
    """Interventions on the residual stream: `{library: FOLDER}` of the vectors that requests and arms name in `steer`,
    and `deployment: [...]` for what is done to every request."""
    server: dict[str, Any] = Field(default_factory=dict)
    """SGLang server arguments, e.g. `chunked_prefill_size: 256`."""
    concurrency: int = Field(default=16, ge=1)
    """Requests in flight at once, in each replica."""
    order: Order = "as_given"
    """`as_given`: requests are sent in the order of the workload. `families`: a request that shares its first 32 tokens
    or more with an earlier one waits until that one's prompt is computed and in the prefix cache; others are sent
    meanwhile. Has no effect where nothing is reused, or where `partners` are served in groups."""
    replicas: int = Field(default=1, ge=1)
    """Engines that make the recording together, each with a cache of its own; several need Ray
    (`sglang-probe[ray]`). Requests that begin alike stay together."""
    checkpoint_seconds: float = Field(default=20.0, gt=0)
    """How often the recording is written to disk: the most seconds of it that a crash can cost."""
    output: Path = Path("runs")
    """Folder in which the run directory is made. Relative to the working directory, unlike all that is read."""

    @field_validator("model")
    @classmethod
    def _beside_the_yaml(cls, name: str, info: ValidationInfo) -> str:
        folder = (info.context or {}).get("folder")
        if folder is None or name in BUILT_IN_MODELS or not (folder / name / "config.json").exists():
            return name
        return beside(name, folder)

    @field_validator("hook_points")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            parse_pattern(name)
        return list(dict.fromkeys(names))


class WorkloadRecording(Recording):
    """A recording, or several, of one workload."""

    workload: WorkloadConfig
    """Where the requests come from; `source` chooses."""


def refuse_rows(config: Recording) -> None:
    """Refuse `rows` that keep some positions in a study that compares all of them, before anything is served.

    Raises:
        ValueError: a hook point would not hold every position.
    """
    if partial := Selected(*expanded(config.rows, config.hook_points, None)).partial:
        raise ValueError(f"this study reads all positions, and `rows` keeps some of `{partial[0]}`: leave it out")


ENDS_AN_OUTPUT = frozenset(
    {"stop", "stop_token_ids", "stop_regex", "regex", "json_schema", "ebnf", "structural_tag", "max_new_tokens"}
    | {"min_new_tokens", "ignore_eos", "n"}
)


def refuse_ends(sampling: Mapping[str, Any], length: str) -> None:
    """Refuse sampling parameters that would end outputs, in a study that compares outputs of a length of its own.

    Args:
        length: the key that sets it.

    Raises:
        ValueError: names the parameter.
    """
    if ending := sorted(ENDS_AN_OUTPUT & sampling.keys()):
        raise ValueError(f"`{ending[0]}` has no meaning here: every output is as long as `{length}` says")


R = TypeVar("R", bound=Recording)


def with_skip_bad(config: R, skip_bad: bool) -> R:
    """The configuration, passing over records of its workload or `workloads` that cannot be used, if `skip_bad`.

    Raises:
        ConfigError: no workload is read from a file.
    """
    if not skip_bad:
        return config
    several = getattr(config, "workloads", None)
    given = [config.workload] if several is None else list(several.values())  # type: ignore[attr-defined]
    if not any(_reads_a_file(w) for w in given):
        raise ConfigError(
            f"`--skip-bad` has no meaning where no workload reads a file: a `{given[0].source}` workload reads no file"
        )
    if several is None:
        return config.model_copy(update={"workload": _skipping(given[0])})
    return config.model_copy(update={"workloads": {task: _skipping(w) for task, w in several.items()}})


def _reads_a_file(workload: WorkloadConfig) -> bool:
    return "skip_bad" in type(workload).model_fields


def _skipping(workload: WorkloadConfig) -> WorkloadConfig:
    return workload.model_copy(update={"skip_bad": True}) if _reads_a_file(workload) else workload


class HarvestConfig(WorkloadRecording):
    """One run."""

    order: Order = "families"
    """As in every recording, but `families` by default, so that what requests share is computed once."""
    name: FolderName | None = None
    """Name of the run directory; by default the name of the YAML file."""
    arm: Arm = Arm()
    """How SGLang is used: its prefix cache, who shares a batch, dtype, server arguments."""
    withhold: Withhold | None = None
    """Take personal data out of the run before the command ends: `{pii: [email, ...], neighbours: 1}`. Until then it is
    on disk. Absent: nothing is."""
    upload: UploadConfig | None = None
    """Copy the run to an object store or another file system, part by part, while it is recorded:
    `{to: s3://bucket/path}`. With `withhold`, only after the data was taken out. A target that is down does not hold up
    the recording. Absent: the run is not copied."""
