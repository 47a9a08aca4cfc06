"""The YAML of `sglang-probe steer decay`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from sglang_probe.config import Config, FolderName, InputPath
from sglang_probe.harvest.config import WorkloadRecording, refuse_ends, refuse_rows
from sglang_probe.policy.arm import Arm
from sglang_probe.steer_ask import Steer, Unit
from sglang_probe.workload.build import WorkloadConfig
from sglang_probe.workload.documents import Documents


class Target(Config):
    """Tokens whose log-odds say whether the vector does what it is for."""

    positive: list[str | int] = Field(min_length=1)
    """Tokens that it should make likelier: texts that are one token each (a space in front counts), or token ids."""
    negative: list[str | int] = Field(min_length=1)
    """Tokens that it should make less likely."""


class Downstream(Config):
    """Features of a later layer, whose activation says whether the dose arrives there as what it is meant to be."""

    sae: InputPath
    """Folder of the SAE. Its hook point must lie after that of the vector."""
    features: list[int] = Field(min_length=1)
    """Indices; their activations are added."""


class SteerDecayConfig(WorkloadRecording):
    """A study of steering decay. Every text is cut to a prompt; one dose is given at each onset, in the model's own
    continuation and, as the depth control, in the text's."""

    name: FolderName | None = None
    """Name of the study's folder; by default the name of the YAML file."""
    workload: WorkloadConfig = Field(default_factory=Documents)
    """Where the texts come from; by default excerpts of Python's standard library."""
    vector: str
    """The vector of the library (`steer: {library: FOLDER}`) whose effect is measured."""
    random: list[str] = Field(min_length=1)
    """Its controls: random vectors of the residual's covariance at the same hook point
    (`sglang-probe vector make random NAME --like VECTOR`)."""
    strength: float = 0.3
    """How much is added."""
    unit: Unit = "mean_norm"
    """In what: `mean_norm` is the layer's mean norm of the residual, `absolute` a length."""
    onsets: list[int] = Field(default=[1, 10, 50, 200], min_length=2)
    """Steps at which the dose begins. Step 1 is the forward pass whose input is the first generated token."""
    window: int = Field(default=12, ge=1)
    """Steps that are steered: the same dose at every onset."""
    after: int = Field(default=12, ge=1)
    """Steps after it that are measured."""
    prompt_tokens: int = Field(default=64, ge=1)
    """Tokens of each text that serve as its prompt."""
    sampling: dict[str, Any] = Field(default_factory=lambda: {"temperature": 1.0})
    """Sampling of the model's own continuation; its length follows from the onsets."""
    target: Target | None = None
    """Tokens whose log-odds are the effect; by default those that the vector's own unembedding favours most and least
    (`lens` of each). Those follow from the vector, so that they say that it acts, not that it means what its name
    says."""
    lens: int = Field(default=20, ge=1)
    """How many of each, where `target` is not given."""
    free: bool = True
    """Also let the model go on from the dose by itself, and count the target's tokens in what it writes."""

    downstream: Downstream | None = None
    """Features of a later layer that are read in the teacher-forced runs."""
    probe: str | None = None
    """A probe of the library (`vector make probe`), of texts that are not measured here. What each arm wrote by itself
    is read again without steering, and the probe scores it. Needs `free`."""

    concept: str | None = None
    """In words, what the vector is for: what a judge is asked about (`--judge`)."""

    @model_validator(mode="after")
    def _fits(self) -> SteerDecayConfig:
        refuse_rows(self)
        refuse_ends(self.sampling, "onsets")
        if self.steer is None:
            raise ValueError("`steer: {library: FOLDER}` is missing: where the vectors are")
        if self.steer.deployment:
            raise ValueError("`steer.deployment` has no place here: nothing but the dose may steer")
        if sorted(set(self.onsets)) != self.onsets or self.onsets[0] < 1:
            raise ValueError("`onsets` are ascending steps, from 1")
        if self.strength == 0:
            raise ValueError("a dose of 0 is measured as a control anyway: give a `strength`")
        if self.vector in self.random or len(set(self.random)) < len(self.random):
            raise ValueError("`random` has other vectors than `vector`, each once")
        if self.probe is not None and not self.free:
            raise ValueError("`probe` scores what the model writes by itself, and `free: false` leaves that out")
        return self

    @property
    def steps(self) -> int:
        """Steps of the longest continuation that are measured."""
        return self.onsets[-1] + self.window + self.after - 1

    @property
    def arm(self) -> Arm:
        """The cache is on: what lies before the onset is that of the plain model, and shared."""
        return Arm()

    def dose(self, vector: str, onset: int, *, strength: float | None = None) -> Steer:
        """The intervention at an onset; `strength`: another one."""
        return Steer(
            vector=vector,
            op="add",
            strength=self.strength if strength is None else strength,
            unit=self.unit,
            phases=("decode",),
            generation_window=(onset, onset + self.window),
        )
