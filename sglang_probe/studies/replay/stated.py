"""What a manifest of features says should have been done to each request, and where the run's own record differs.

Where an intervention acts (positions, gate) is the request's own affair and comes from the ledger; by which feature,
how, and how much comes from the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from sglang_probe.errors import ConfigError
from sglang_probe.steer_ask import Gate, Steer
from sglang_probe.steering.features import Direction, Feature, FeatureManifest
from sglang_probe.steering.library import Library, Vector
from sglang_probe.steering.spec import Spec, Step

ACTING = ("validated", "deployed")
"""What a feature or direction must be to act."""
NONE: Mapping[str, Vector] = MappingProxyType({})


@dataclass(frozen=True)
class Stated:
    """The interventions of one request as the manifest has them."""

    steer: tuple[Steer, ...]
    differences: tuple[str, ...]
    """Where the ledger says something else."""


def entries_of(library: Library, manifest: FeatureManifest, *, needed: bool = True) -> dict[str, Feature | Direction]:
    """The manifest's features and directions by the hash of the library's entry for each.

    Raises:
        ConfigError: the library has no entry of anything that the manifest lists, and one is `needed`; or what the
            manifest says of a direction is not what its card says.
    """
    directions = {d.sha256: d for d in manifest.directions}
    found: dict[str, Feature | Direction] = {}
    for vector in library.values():
        if vector.hash in directions:
            found[vector.hash] = directions[vector.hash]
            directions[vector.hash].check(vector)
        index = _index(vector, manifest)
        listed = [f for f in manifest.features if f.index == index]
        if listed and vector.card.hook_point == manifest.hook_point:
            found[vector.hash] = listed[0]
    if needed and not found:
        raise ConfigError(
            f"the library has no feature or direction that the manifest lists ({', '.join(_shown(manifest))})",
            fix="give the library that the run was steered by (`--library`)",
        )
    return found


def stated(
    spec: Spec, entries: Mapping[str, Feature | Direction], library: Library, served: Mapping[str, Vector] = NONE
) -> Stated:
    """What should have been done to a request that ran under `spec`.

    Args:
        entries: by the hash that the ledger has of each (`entries_of`).
        served: by the hash that the ledger has of it, the library's entry for a feature that the server clamped of
            itself (`clamped.py`).

    Raises:
        ConfigError: it was done by a vector that the library does not have.
    """
    names = {**{v.hash: v for v in library.values()}, **served}
    steer, differences = [], []
    for step in spec.steps:
        if step.hash not in names or (step.probe is not None and step.probe.hash not in names):
            raise ConfigError(
                f"the run was steered by `{step.vector}` ({step.hash[:12]}), which the library does not have",
                fix="give the library that it was steered by (`--library`)",
            )
        should, wrong = _should(step, entries.get(step.hash), None if step.hash in served else names[step.hash])
        differences += wrong
        probe = None if step.probe is None else names[step.probe.hash].name
        steer.append(_asked(should, names[step.hash].name, probe))
    return Stated(tuple(steer), tuple(differences))


def _should(step: Step, entry: Feature | Direction | None, vector: Vector | None) -> tuple[Step, list[str]]:
    """The step as the manifest states it, and what the ledger says otherwise.

    Args:
        vector: the library's; None: it was made as the manifest states.
    """
    if entry is None:
        return step, [f"`{step.vector}` acted, which is no feature or direction of the manifest"]
    name, action = entry.title, entry.action
    if action is None:
        return step, [f"{name} acted, and the manifest states no clamp of it"]
    wrong = []
    if entry.status not in ACTING:
        wrong.append(f"{name} acted, and is `{entry.status}`")
    amount = action.amount
    if (step.op, step.amount) != (action.mode, amount):
        wrong.append(
            f"{name}: `{step.op}` {step.amount:g} was done, and the manifest states `{action.mode}` {amount:g}"
        )
    gated = step.gated
    if action.threshold:
        own = action.threshold if vector is None else vector.threshold or 0.0
        if abs(own - action.threshold) > 1e-6 * max(1.0, action.threshold):
            wrong.append(f"{name}: its threshold in the library is {own:g}, and the manifest's {action.threshold:g}")
        # `cap` and `ablate_feature` leave what is not active alone by themselves.
        if action.mode == "clamp":
            if not step.gated:
                wrong.append(f"{name}: rows below the manifest's threshold were changed too")
            gated = True
    return replace(step, op=action.mode, amount=amount, gated=gated and action.mode == "clamp"), wrong


def _asked(step: Step, name: str, probe: str | None) -> Steer:
    """A step as a request writes it: what `steering.spec.spec_of` makes a step of, backwards."""
    told: dict[str, Any] = {"vector": name, "op": step.op, "strength": step.amount, "exclude": step.exclude}
    told["phases"] = [p for p, w in (("prefill", step.prompt), ("decode", step.generation)) if w is not None]
    if step.prompt not in (None, (0, None)):
        told["prompt_window"] = step.prompt
    if step.generation not in (None, (1, None)):
        told["generation_window"] = step.generation
    if probe is not None:
        told["gate"] = Gate(by="probe", probe=probe, active=step.gated)
    elif step.gated:
        told["gate"] = Gate(by="feature")
    if step.random_error is not None:
        told["random_error"] = step.random_error
    return Steer.model_validate(told)


def _shown(manifest: FeatureManifest) -> list[str]:
    return [e.title for e in manifest.entries] or ["nothing"]


def _index(vector: Vector, manifest: FeatureManifest) -> int | None:
    """The latent that an entry is, if it is one of the manifest's SAE."""
    origin = vector.card.made_by.inputs.get("sae")
    if vector.card.kind != "feature" or not isinstance(origin, dict):
        return None
    if origin.get("weights_sha256") != manifest.sae_sha256:
        return None
    index = origin.get("feature")
    return index if isinstance(index, int) else None
