"""What the probe does inside the engine: the YAML that `SGLANG_PROBE` names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sglang_probe.ask import Ask
from sglang_probe.config import Config, InputPath
from sglang_probe.engine.live.config import LiveConfig
from sglang_probe.errors import ConfigError
from sglang_probe.monitor.config import MonitorConfig, check_projections
from sglang_probe.policy.switches import Switches
from sglang_probe.run.hook_points import has_patterns, parse_pattern
from sglang_probe.run.selection import RowsConfig, check_selection, expanded
from sglang_probe.run.telemetry_options import TelemetryConfig
from sglang_probe.steering.config import ScoresConfig, SteerConfig
from sglang_probe.steering.scores import check_given

CONFIG_VARIABLE = "SGLANG_PROBE"
"""Environment variable with the path of the probe's YAML; unset means inert."""

ENGINE_FILE = "engine.json"
"""Written into the run directory of a harvest by the scheduler: what is in force in it. The manifest takes it over."""

FAULT_FILE = "fault.txt"
"""Written into the run directory when the probe stopped itself; its content says why."""

CRASHED = "SGLang's scheduler crashed"
"""How that content begins if the engine ends with it."""


def fault_file(replica: int) -> str:
    """The fault file of one of the engines that make a run: what ends one of them says nothing of the others."""
    return FAULT_FILE if replica == 0 else f"fault-dp{replica}.txt"


class EngineProbeConfig(Config):
    """What one engine process records.

    For a live server, set `run` and `live`, and what else you need. `start`, `replica`, `kept`, `switches`, `proving`,
    `slot_truth` and `ignore_interrupt` are set by the commands that start an engine.
    """

    hints: ClassVar[Mapping[str, str]] = {
        "accelerator": "rows on a GPU need a certificate of `sglang-probe prove`, which is found without a key"
    }

    run: Path
    """Directory to write to."""
    hook_points: list[str] = Field(default_factory=list)
    """Rows to capture, e.g. `[hook_embed, blocks.10.hook_resid_post]`. Empty: the ledger alone."""
    certificate: Literal["auto"] | InputPath = "auto"
    """On an accelerator rows, telemetry and interventions need a certificate of `sglang-probe prove` for this
    configuration on this machine: `auto` finds it in the cache folder, or name the file. A CPU needs none."""
    rows: RowsConfig = RowsConfig()
    """Which positions and heads of them; by default all."""
    scores: ScoresConfig | None = None
    """What `blocks.<layer>.hook_scores` among the `hook_points` are of: `{library: FOLDER}`, whose probes have a column
    each. A score is written instead of a row."""
    telemetry: TelemetryConfig | None = None
    """Attention statistics of decode steps; absent: none."""
    live: LiveConfig | None = None
    """Present: a live server is recorded, in segments below `run`. Absent: one run, closed by who started it."""
    start: int = 0
    """Number of this engine's start within the run; a resumed run goes on after what is on disk."""
    replica: int = 0
    """Which of the engines that make this run: it writes the ledger of the data-parallel rank of this number."""
    checkpoint_seconds: float = 20.0
    """Whatever was computed is durable at most so much, and the time of one write, later."""
    asks: list[str] = Field(default_factory=list)
    """What requests may ask of this engine (`sglang_probe.ask`), besides `provenance`, which a live server always
    answers, and `system`, which telemetry reads. A request that asks for more is refused."""
    kept: InputPath | None = None
    """The kept sets that requests of this recording may name (`sglang_probe.kept_set`)."""
    steer: SteerConfig | None = None
    """Interventions on the residual stream: `{library: FOLDER}`, with `asks: [steer]` for those that requests name, and
    `deployment: [...]` for those on every request. Absent: none."""
    monitor: MonitorConfig | None = None
    """Decode rows of a live server are read, and requests judged by a profile, while it serves. Absent: nothing is."""
    switches: Switches = Switches()
    """What is set in the running engine before this recording begins."""
    proving: bool = False
    """Set by `sglang-probe prove`: the engine is being proved, so that there is no certificate yet."""
    simulated_graphs: bool = False
    """Set by the probe's own tests: on a CPU, rows leave the model as they would leave a graph."""
    slot_truth: Path | None = None
    """Set by `sglang-probe prove`: where to report the true owner of every KV slot, read from the device. Slow."""
    ignore_interrupt: bool = False
    """Leave Ctrl-C, SIGTERM and SIGHUP to the process that started the engine, so that it can close the run first."""

    @field_validator("hook_points")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            parse_pattern(name)
        return names

    def of_layers(self, layers: int) -> EngineProbeConfig:
        """With the hook points that its patterns mean in a model of so many layers.

        Raises:
            ConfigError: two patterns select at one hook point.
        """
        rows, points = expanded(self.rows, self.hook_points, layers)
        return self.model_copy(update={"rows": rows, "hook_points": points})

    @field_validator("asks")
    @classmethod
    def _are_asks(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in Ask.model_fields:
                raise ValueError(f"`{name}` is nothing that requests ask; they ask {', '.join(Ask.model_fields)}")
        return names

    @model_validator(mode="after")
    def _fits(self) -> EngineProbeConfig:
        if self.monitor is not None and self.live is None:
            raise ValueError("`monitor` watches a live server: it needs `live: {}`; `sglang-probe monitor` reads runs")
        if self.monitor is not None and self.live is not None and self.live.privacy != "ids":
            try:
                check_projections(len(self.monitor.features) + len(self.monitor.vectors))
            except ConfigError as e:
                raise ValueError(str(e)) from None
        if self.kept is not None and "evict" not in self.asks:
            raise ValueError("`kept` has no effect without `asks: [evict]`")
        if self.kept is not None and self.telemetry is not None:
            raise ValueError("`telemetry` reads every cached key, a request with a kept set some: leave one out")
        if "rows" in self.asks and (self.live is None or not self.hook_points):
            raise ValueError("`asks: [rows]` needs `live` and `hook_points`: a server hands out rows that it records")
        if self.steer is None and "steer" in self.asks:
            raise ValueError("`asks: [steer]` needs a library: `steer: {library: FOLDER}`")
        if self.steer is not None and not (self.steer.deployment or self.steer.clamps) and "steer" not in self.asks:
            raise ValueError("`steer` has no effect without `asks: [steer]`, a `deployment` or `clamps`")
        if self.steer is not None and self.steer.clamps and self.live is None:
            raise ValueError("`clamps` are of a live server's traffic; a harvest's requests name what is done to them")
        try:
            check_selection(self.rows, self.hook_points)
            if not has_patterns(self.hook_points):
                check_given(self.scores, self.hook_points)
        except ConfigError as e:
            raise ValueError(str(e)) from None
        if self.live is not None and self.hook_points:
            if self.live.privacy != "ids":
                raise ValueError("captured rows can be inverted to text: `hook_points` need `live: {privacy: ids}`")
            if self.live.when_full == "drop":
                raise ValueError("rows cannot be dropped: with `hook_points` set `live: {when_full: block}` or nothing")
        return self
