"""What the configuration of an engine or of a recording says of interventions."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from sglang_probe.config import Config, InputPath
from sglang_probe.steer_ask import MOST, Steer
from sglang_probe.steering.library import Library


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
    passes: int = Field(default=2, ge=1, le=MOST)
    """Where interventions are recorded into graphs (`accelerator`): how many a layer makes of one request at most. Each
    costs a gather and a few products a row, used or not."""
    fused: bool = False
    """Where interventions are recorded into graphs: one kernel for those of a layer, instead of PyTorch's operations.
    It was run in Triton's interpreter only, not on a GPU."""
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


def told(config: SteerConfig, library: Library) -> dict[str, Any]:
    """What the manifest says: every vector by what `steering.spec` reads of it, and what is done to all requests."""
    vectors = {
        v.card.name: {
            "hash": v.hash,
            "kind": v.card.kind,
            "hook_point": v.card.hook_point,
            "norm": v.card.norm,
            "layer_mean_norm": v.card.layer_mean_norm,
            "percentile99": v.card.percentile99,
        }
        for v in library.values()
    }
    deployment = [s.model_dump(mode="json", exclude_defaults=True) for s in config.deployment]
    return {"library": library.hash, "vectors": vectors, "deployment": deployment}
