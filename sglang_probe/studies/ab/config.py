"""The YAML of `sglang-probe ab`."""

from __future__ import annotations

from pydantic import Field, model_validator

from sglang_probe.config import FolderName
from sglang_probe.harvest.config import WorkloadRecording, refuse_rows
from sglang_probe.policy.arm import Arm


class AbConfig(WorkloadRecording):
    """Several arms over the same requests with the same output tokens."""

    name: FolderName | None = None
    """Name of the experiment's folder; by default the name of the YAML file."""
    arms: dict[FolderName, Arm] = Field(
        default_factory=lambda: {"cache_on": Arm(), "cache_off": Arm(cache="off")}, min_length=2
    )
    """The first arm samples; the decode of all others is forced to its tokens. Each name is a run's folder."""
    replicates: int = Field(default=2, ge=1)
    """How often each arm runs: the difference of an arm to itself is the floor beside every effect."""
    order_seed: int = 0
    """Seed that shuffles the order of the arms within a replicate."""
    baseline: str | None = None
    """The arm that the others are compared with; by default the first."""
    margin: float = Field(default=1e-3, gt=0)
    """By how much relative L2 an effect may exceed the floor and still be called equivalent; stated beforehand."""
    force_outputs: bool = True
    """`false`: every arm samples its own outputs, which are compared up to where they differ."""

    @model_validator(mode="after")
    def _baseline_is_an_arm(self) -> AbConfig:
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"`baseline: {self.baseline}` is no arm; arms: {', '.join(self.arms)}")
        return self

    @model_validator(mode="after")
    def _compares_all_positions(self) -> AbConfig:
        refuse_rows(self)
        return self
