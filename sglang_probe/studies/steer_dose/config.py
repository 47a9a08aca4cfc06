"""The YAML of `sglang-probe steer dose`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from sglang_probe.config import Config, FolderName, InputPath
from sglang_probe.harvest.config import WorkloadRecording, refuse_ends, refuse_rows
from sglang_probe.policy.arm import Arm
from sglang_probe.steer_ask import Op, Steer, Unit
from sglang_probe.studies.steer_decay.config import Target
from sglang_probe.workload.build import WorkloadConfig
from sglang_probe.workload.documents import Documents


class DoseArm(Config):
    """One way of steering, in several doses. Either `vectors`, or `selected`, or `prefixes`."""

    vectors: list[str] | None = Field(default=None, min_length=1)
    """Of the library. Of several, effects are averaged: random vectors are one arm."""
    selected: bool = False
    """The features that `select` chooses."""
    prefixes: list[str] | None = Field(default=None, min_length=1)
    """Prompting: texts that are put before the prompt, from the weakest to the strongest. Each is a dose."""
    op: Op = "add"
    """What is done with a vector; `ablate_feature`, `clamp` and `cap` need a feature."""
    unit: Unit | None = None
    """Of the doses; by default `mean_norm` of `add`, `p99` of `clamp` and `cap`. Other operations take fractions."""
    doses: list[float] = Field(default_factory=list)
    """Strengths, from the weakest to the strongest."""

    @model_validator(mode="after")
    def _is_one_way(self) -> DoseArm:
        if (self.vectors is not None) + self.selected + (self.prefixes is not None) != 1:
            raise ValueError("an arm has one of `vectors`, `selected: true` and `prefixes`")
        if (self.prefixes is None) == (not self.doses):
            raise ValueError("`vectors` and `selected` need `doses`, and `prefixes` have none")
        if self.prefixes is not None and (self.op != "add" or self.unit is not None):
            raise ValueError("`op` and `unit` have no meaning for `prefixes`")
        if self.op == "splice":
            raise ValueError("`splice` is no dose of a direction")
        if len(set(self.doses)) < len(self.doses):
            raise ValueError("a dose is given twice")
        for dose in self.doses:
            self.steer("-", dose)
        return self

    def steer(self, vector: str, dose: float) -> Steer:
        """The intervention on the generated tokens.

        Raises:
            ValueError: the dose is none of the operation's.
        """
        units: dict[Op, Unit] = {"add": "mean_norm", "clamp": "p99", "cap": "p99"}
        unit = self.unit or units.get(self.op, "absolute")
        return Steer(vector=vector, op=self.op, strength=dose, unit=unit, phases=("decode",))

    @property
    def levels(self) -> list[str]:
        """Each dose in words."""
        return self.prefixes or [f"{d:g}" for d in self.doses]


class Select(Config):
    """How features of an SAE are chosen: by their output score, which is how much adding the feature's decoder row
    raises the log-probability of its own logit-lens tokens (Arad et al. 2025, arXiv:2505.20063), not by what activates
    them."""

    sae: InputPath
    """Folder of the SAE."""
    run: InputPath
    """A run with rows of its hook point: the feature's rate and 99th percentile, and the mean norm, are of it."""
    candidates: int = Field(default=16, ge=1)
    """Features that are tried: those whose decoder rows favour the target most, by the unembedding alone."""
    take: int = Field(default=1, ge=1)
    """Of these, so many with the highest output scores."""
    texts: int = Field(default=6, ge=1)
    """Texts that the choice is made on. They take no part in what follows."""
    dose: float = Field(default=0.2, gt=0)
    """In mean norms of the residual."""
    lens: int = Field(default=20, ge=1)
    """Logit-lens tokens of a feature."""
    same_model: bool = False
    """The run is of the SAE's model, although the names differ."""


class Comparison(Config):
    """One comparison that is registered beforehand; all of them are adjusted together (Holm)."""

    arm: str
    """Name of an arm."""
    against: str | None = None
    """Another arm; without it, the effect of `arm` at its last dose is compared with none."""
    at: float | None = Field(default=None, gt=0)
    """The side effect at which both are compared, nats; by default that of `arm` at its last dose."""

    @model_validator(mode="after")
    def _fits(self) -> Comparison:
        if self.against is None and self.at is not None:
            raise ValueError("`at` needs an arm to compare with: `against`")
        if self.arm == self.against:
            raise ValueError(f"`{self.arm}` is compared with itself")
        return self

    @property
    def words(self) -> str:
        """It as a line."""
        if self.against is None:
            return f"{self.arm} at its last dose, against none"
        return f"{self.arm} against {self.against}, " + (
            f"at {self.at:g} nats" if self.at else "at its own side effect"
        )


class SteerDoseConfig(WorkloadRecording):
    """A study of doses. Effects are measured on the texts of `workload`, side effects on those of `neutral`; in both, a
    prompt is followed by the text's own tokens, decoded by force."""

    name: FolderName | None = None
    """Name of the study's folder; by default the name of the YAML file."""
    workload: WorkloadConfig = Field(default_factory=Documents)
    """Texts on which steering should act."""
    neutral: WorkloadConfig
    """Texts on which it should not: what it does to them is the side effect."""
    target: Target
    """Tokens whose log-odds are the effect."""
    arms: dict[FolderName, DoseArm] = Field(min_length=2)
    """Ways of steering, by name."""
    select: Select | None = None
    """How the features of arms with `selected: true` are chosen."""
    side_effects: list[float] = Field(default=[0.05, 0.1, 0.2], min_length=1)
    """KL on neutral texts, nats a token, at which all arms are shown side by side."""
    registered: list[Comparison] = Field(min_length=1)
    """What is asked. Only these have p-values."""
    prompt_tokens: int = Field(default=64, ge=1)
    """Tokens of each text that serve as its prompt."""
    steps: int = Field(default=24, ge=1)
    """Steps that are steered and measured."""
    free_steps: int = Field(default=48, ge=0)
    """Steps for which every arm goes on by itself, for repetition; 0 leaves that out."""
    most_texts: int = Field(default=24, ge=1)
    """So many texts at most, those of `select` not counted, and as many neutral ones."""
    sampling: dict[str, Any] = Field(default_factory=lambda: {"temperature": 1.0})
    """Sampling of the arms that go on by themselves."""

    @field_validator("side_effects")
    @classmethod
    def _ascend(cls, levels: list[float]) -> list[float]:
        if sorted(set(levels)) != levels or levels[0] <= 0:
            raise ValueError("`side_effects` are positive and ascend")
        return levels

    @model_validator(mode="after")
    def _fits(self) -> SteerDoseConfig:
        refuse_rows(self)
        refuse_ends(self.sampling, "free_steps")
        if self.steer is None:
            raise ValueError("`steer: {library: FOLDER}` is missing: where the vectors are")
        if self.steer.deployment:
            raise ValueError("`steer.deployment` has no place here: nothing but the dose may steer")
        chosen = [name for name, arm in self.arms.items() if arm.selected]
        if bool(chosen) != (self.select is not None):
            raise ValueError("`select` says which features an arm with `selected: true` has, and nothing else")
        if self.select is not None and self.select.take > self.select.candidates:
            raise ValueError("`select.take` is more than `candidates`")
        for c in self.registered:
            for name in (c.arm, c.against):
                if name is not None and name not in self.arms:
                    raise ValueError(f"registered: `{name}` is no arm; there are {', '.join(self.arms)}")
        return self

    @property
    def arm(self) -> Arm:
        """The cache is on: prompts are shared by all arms."""
        return Arm()
