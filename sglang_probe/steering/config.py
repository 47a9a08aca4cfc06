"""What the configuration of an engine or of a recording says of interventions."""

from __future__ import annotations

from pydantic import Field, field_validator

from sglang_probe.config import Config, InputPath
from sglang_probe.steer_ask import MOST, Steer


class ScoresConfig(Config):
    """Which vectors the hook points `hook_scores` write `x @ w` of, instead of rows."""

    library: InputPath
    """Folder of vectors (`sglang-probe vector`)."""
    names: list[str] | None = Field(default=None, min_length=1)
    """Probes and directions of it, a column each; by default all probes of the layers that are captured."""
    hash: str | None = None
    """Hash of the library, if it must be this one; set by `sglang-probe harvest`."""


class SteerConfig(Config):
    """Which vectors requests may name, and what is done to all of them."""

    library: InputPath
    """Folder of vectors (`sglang-probe vector`). The layers of their hook points are those that can be changed."""
    deployment: tuple[Steer, ...] = Field(default=(), max_length=MOST)
    """Interventions on every request, before its own ones. Of all positions: they have no `phases` and no windows."""
    hash: str | None = None
    """Hash of the library, if it must be this one; set by `sglang-probe harvest`."""

    @field_validator("deployment")
    @classmethod
    def _of_all_positions(cls, entries: tuple[Steer, ...]) -> tuple[Steer, ...]:
        for entry in entries:
            for name in ("phases", "prompt_window", "generation_window"):
                if getattr(entry, name) != type(entry).model_fields[name].default:
                    raise ValueError(f"`{name}` has no place here: a deployment acts on all positions of all requests")
        return entries
