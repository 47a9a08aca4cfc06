"""The YAML of `sglang-probe sae hybrid`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from sglang_probe.config import InputPath
from sglang_probe.harvest.config import WorkloadRecording, refuse_ends
from sglang_probe.studies.phase.config import PhaseConfig
from sglang_probe.studies.sae_stability.config import DictionariesOf
from sglang_probe.workload.build import WorkloadConfig
from sglang_probe.workload.documents import Documents


class SaeHybridConfig(DictionariesOf):
    """Records texts as human text, as decoded by the model, and that prefilled again; and trains on mixtures. With
    `runs` it trains on what was recorded before."""

    runs: InputPath | None = None
    """Folder with the runs `human`, `decoded` and `reforward` of `sglang-probe sae gap` or `phase`, which are trained
    on in place of new ones. `model`, `workload`, `sampling` and the like were decided there and are left out here.
    `prompt_tokens` is at least that of the recording, and the continuation ends where it did or before."""
    workload: WorkloadConfig = Field(default_factory=Documents)
    """Where the texts come from; by default excerpts of Python's standard library."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of each text that serve as its prompt."""
    continuation_tokens: int = Field(default=128, ge=1)
    """Tokens after the prompt whose rows are trained on."""
    sampling: dict[str, Any] = Field(default_factory=lambda: {"temperature": 1.0})
    """Sampling of the decoded continuation; its length is set by `continuation_tokens`."""
    shares: list[float] = Field(default_factory=lambda: [0, 0.25, 0.5, 1], min_length=2)
    """Shares of the rows that are of the model's own text; the first must be 0, human text alone."""

    @model_validator(mode="after")
    def _can_be_mixed(self) -> SaeHybridConfig:
        refuse_ends(self.sampling, "continuation_tokens")
        recording = (set(WorkloadRecording.model_fields) - {"hook_points", "output"}) & self.model_fields_set
        if self.runs is not None and recording:
            raise ValueError(f"`{min(recording)}` was decided when `runs` were recorded: leave it out")
        if self.shares[0] != 0 or sorted(set(self.shares)) != self.shares or self.shares[-1] > 1:
            raise ValueError("`shares` rise from 0 to at most 1, e.g. [0, 0.25, 0.5, 1]")
        return self

    @property
    def phase(self) -> PhaseConfig:
        """What is recorded: the runs of `sglang-probe phase`, once each."""
        same = {n: getattr(self, n) for n in PhaseConfig.model_fields if n in type(self).model_fields}
        return PhaseConfig(**{**same, "replicates": 1})
