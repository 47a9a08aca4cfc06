"""The YAML of `sglang-probe phase`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from sglang_probe.config import FolderName
from sglang_probe.harvest.config import WorkloadRecording, refuse_ends, refuse_rows
from sglang_probe.policy.arm import Arm
from sglang_probe.workload.build import WorkloadConfig
from sglang_probe.workload.documents import Documents


class PhaseConfig(WorkloadRecording):
    """A phase study. Every text is cut to `prompt_tokens` and a continuation, whose positions are compared."""

    name: FolderName | None = None
    """Name of the study's folder; by default the name of the YAML file."""
    workload: WorkloadConfig = Field(default_factory=Documents)
    """Where the texts come from; by default excerpts of Python's standard library."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of each text that serve as its prompt."""
    continuation_tokens: int = Field(default=128, ge=1)
    """Tokens after the prompt whose rows are compared."""
    sampling: dict[str, Any] = Field(default_factory=lambda: {"temperature": 1.0})
    """Sampling of the decoded continuation; its length is set by `continuation_tokens`."""
    replicates: int = Field(default=2, ge=1, le=2)
    """2: record every run a second time, in another order, for the floor."""

    @model_validator(mode="after")
    def _compares_all_positions(self) -> PhaseConfig:
        refuse_rows(self)
        refuse_ends(self.sampling, "continuation_tokens")
        if not self.hook_points:
            raise ValueError("this study compares rows: `hook_points` must name some")
        return self

    @property
    def arm(self) -> Arm:
        """Nothing is reused, so that every position is computed in its own phase."""
        return Arm(cache="off")
