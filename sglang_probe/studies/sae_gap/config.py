"""The YAML of `sglang-probe sae gap`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sglang_probe.config import InputPath
from sglang_probe.run.hook_points import EMBED
from sglang_probe.studies.phase.config import PhaseConfig

Kind = Literal["human", "reforward", "decoded"]


class SaeGapConfig(PhaseConfig):
    """A study of one SAE on three kinds of rows: human text prefilled, the model's own text decoded, and that text
    prefilled again. Every text is cut to `prompt_tokens` and a continuation, whose positions are compared. `sae` is
    needed."""

    sae: InputPath
    """Folder of the SAE: of `sglang-probe sae train`, SAELens, or Gemma Scope."""
    hook_point: str | None = None
    """Where its rows come from, for folders that do not say."""
    same_model: bool = False
    """The SAE is of this model, although its folder names another and has no hash of the weights."""
    apart_from: list[InputPath] = Field(default_factory=list)
    """Runs whose documents are left out: those that the SAE was trained on."""
    prompt_tokens: int = Field(default=64, ge=1)
    """Tokens of each text that serve as its prompt."""
    continuation_tokens: int = Field(default=224, ge=2)
    """Tokens after the prompt whose rows are compared; 224 reach the last window of depths."""
    most_texts: int | None = Field(default=None, ge=2)
    """Use so many texts at most, the first ones that are long enough."""
    norm_multiple: float | None = Field(default=10.0, gt=1)
    """Rows whose norm is more than so many times the median of human rows are left out as attention sinks."""
    spliced: tuple[Kind, ...] = ("human", "decoded")
    """Kinds of run that are recorded again with the residual stream replaced over the continuation: by the
    reconstruction, by the row plus a random error of the same length, by the mean row, and by zero. `[]`: none."""

    @model_validator(mode="after")
    def _chooses_its_own_rows(self) -> SaeGapConfig:
        if self.hook_points != [EMBED]:
            raise ValueError("`hook_points` follow from the SAE: leave them out")
        for name in ("steer", "scores"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` has no meaning here")
        if len(set(self.spliced)) != len(self.spliced):
            raise ValueError("`spliced` names one twice")
        return self
