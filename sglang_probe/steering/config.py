"""What the configuration of an engine or of a recording says of interventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sglang_probe.config import Config, InputPath
from sglang_probe.steer_ask import MOST, Steer
from sglang_probe.steering.clamps import Clamp, ClampConfig
from sglang_probe.steering.library import Library

EXCEEDED, WITHIN, UNSTEERED = "exceeded", "within", "unsteered"
"""Events of the budget of interventions: it is exceeded, or kept again; a request that asked is served without."""


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
    clamps: tuple[ClampConfig, ...] = Field(default=(), max_length=MOST)
    """Clamps of validated features, and changes along validated directions, on the generated tokens of every request
    whose gate opens; they have one gate. Of a live server on a CPU. Requests that are out of scope are served as if
    there were none."""
    passes: int = Field(default=2, ge=1, le=MOST)
    """Where interventions are recorded into graphs (`accelerator`): how many a layer makes of one request at most. Each
    costs a gather and a few products a row, used or not."""
    fused: bool = False
    """Where interventions are recorded into graphs: one kernel for those of a layer, instead of PyTorch's operations.
    It was run in Triton's interpreter only, not on a GPU."""
    budget_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Milliseconds that interventions of requests may cost a forward pass (docs/explanation/interventions.md says what
    is measured and when it is exceeded). By default nothing is measured."""
    over_budget: Literal["refuse", "off"] = "refuse"
    """New requests that ask for interventions while the budget is exceeded: `refuse` them with the reason, or serve
    them without (`off`), which their clients are not told. Requests that run already go on as they were asked."""
    budget_rest: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Seconds from the moment when it was exceeded until interventions are tried again."""
    hash: str | None = None
    """Hash of the library, if it must be this one; set by `sglang-probe harvest`."""

    @model_validator(mode="after")
    def _budget_fits(self) -> SteerConfig:
        # By value: a configuration that was written out says its defaults.
        if self.budget_ms is None and self != self.without_budget:
            raise ValueError("`over_budget` and `budget_rest` have no effect without `budget_ms`")
        if self.clamps and self.deployment:
            raise ValueError("`clamps` have a gate, which cannot be had beside a `deployment`: leave one out")
        if self.budget_ms is not None and self.deployment:
            raise ValueError("`budget_ms` is of what requests ask; a `deployment` is done to all, whatever it costs")
        if self.budget_ms is not None and self.clamps:
            raise ValueError("`budget_ms` is of what requests ask; `clamps` are the server's own, whatever they cost")
        return self

    @property
    def without_budget(self) -> SteerConfig:
        """What an engine is started for: a budget can be another in its next recording."""
        return self.model_copy(update={n: type(self).model_fields[n].default for n in _BUDGET})

    @field_validator("deployment")
    @classmethod
    def _of_all_positions(cls, entries: tuple[Steer, ...]) -> tuple[Steer, ...]:
        for entry in entries:
            for name in ("phases", "prompt_window", "generation_window"):
                if getattr(entry, name) != type(entry).model_fields[name].default:
                    raise ValueError(f"`{name}` has no place here: a deployment acts on all positions of all requests")
        return entries


_BUDGET = ("budget_ms", "over_budget", "budget_rest")


def told(config: SteerConfig, library: Library, clamps: Sequence[Clamp] = ()) -> dict[str, Any]:
    """What the manifest says: every vector by what `steering.spec` reads of it, and what is done to all requests."""
    vectors = {
        v.card.name: {
            "hash": v.hash,
            "kind": v.card.kind,
            "hook_point": v.card.hook_point,
            "norm": v.card.norm,
            "layer_mean_norm": v.card.layer_mean_norm,
            "percentile99": v.card.percentile99,
            **({"threshold": v.threshold} if v.card.kind == "probe" else {}),
        }
        for v in (*library.values(), *(c.vector for c in clamps))
    }
    deployment = [s.model_dump(mode="json", exclude_defaults=True) for s in config.deployment]
    budget = {} if config.budget_ms is None else {n: getattr(config, n) for n in _BUDGET}
    of_traffic = {"clamps": [c.told() for c in clamps]} if clamps else {}
    return {"library": library.hash, "vectors": vectors, "deployment": deployment, **of_traffic, **budget}
