"""Clamps that a server puts on its traffic: a feature or direction that was validated, an operation, and a gate that
says on whom.

What is done is what the manifest of features says (`steering/features.py`): mode, value, threshold. The server's
configuration names the entry and the gate, and nothing else. A feature is read from its SAE, a direction from the
library. One that is a hypothesis, of other weights, of another SAE, vector or hook point is refused before anything is
served.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from sglang_probe.config import Config, InputPath
from sglang_probe.errors import ConfigError
from sglang_probe.sae.folder import weights_sha256
from sglang_probe.steering import library
from sglang_probe.steering.card import Card, MadeBy, VectorName
from sglang_probe.steering.features import Direction, Feature, FeatureManifest, read_features
from sglang_probe.steering.library import Vector
from sglang_probe.steering.resolve import probe_of
from sglang_probe.steering.spec import Spec, Step

if TYPE_CHECKING:
    import torch

MAY_ACT = ("validated", "deployed")
"""Statuses of a feature or direction by which a server may act."""


class ClampConfig(Config):
    """A clamp on the generated tokens of requests whose gate opens."""

    manifest: InputPath
    """`features.json`: what is done, and by what."""
    feature: int | None = Field(default=None, ge=0)
    """Index of a feature that the manifest has as `validated` or `deployed`, with its `clamp`."""
    sae: InputPath | None = None
    """Of a `feature`: folder of its SAE, checked against the manifest."""
    direction: VectorName | None = None
    """In place of a `feature`: a direction that the manifest has so, by its name in `steer: library`, whose entry must
    have the manifest's hash."""
    probe: str = Field(min_length=1)
    """The gate of intent: name of a probe of `steer: library`. On the prompt's last row it says whether a request is in
    scope; nothing of another request is touched."""

    @model_validator(mode="after")
    def _names_one(self) -> ClampConfig:
        if (self.feature is None) == (self.direction is None):
            raise ValueError("give either `feature`, a latent of an SAE, or `direction`, a vector of the library")
        if (self.feature is None) != (self.sae is None):
            raise ValueError("a `feature` needs its `sae`, and a `direction` has none")
        return self


@dataclass(frozen=True)
class Clamp:
    """One of them, checked."""

    config: ClampConfig
    manifest: FeatureManifest
    entry: Feature | Direction
    vector: Vector
    """The direction, or the feature with the threshold of the clamp where that is above its own."""

    @property
    def step(self) -> Step:
        """What is done, without its gate: on all generated tokens."""
        action = self.entry.action
        assert action is not None
        return Step(
            vector=self.vector.name,
            hash=self.vector.hash,
            hook_point=self.vector.card.hook_point,
            op=action.mode,
            amount=action.amount,
            gated=action.mode == "clamp" and isinstance(self.entry, Feature),
            prompt=None,
            generation=(1, None),
            exclude=(),
        )

    def told(self) -> dict[str, Any]:
        """For a run's manifest and the server's status."""
        entry = self.entry
        assert entry.action is not None
        of: dict[str, Any] = {"direction": entry.key}
        if isinstance(entry, Feature):
            of = {"feature": entry.index, "sae_sha256": self.manifest.sae_sha256}
        return {
            **of,
            "label": entry.label,
            "status": entry.status,
            "manifest_sha256": self.manifest.sha256,
            "revision": self.manifest.revision,
            "hook_point": self.vector.card.hook_point,
            "clamp": entry.action.model_dump(mode="json"),
            "probe": self.config.probe,
            "vector": self.vector.name,
            "hash": self.vector.hash,
        }


def read_clamps(
    given: Sequence[ClampConfig],
    vectors: Mapping[str, Vector],
    *,
    width: int,
    layers: int,
    weight_hash: str | None,
) -> list[Clamp]:
    """Read and check the clamps of a server.

    Args:
        vectors: of its library, where directions are.
        width, layers, weight_hash: of the model that is served.

    Raises:
        ConfigError: a feature or direction may not act, or is not of this model, SAE, library or hook point; names
            which.
    """
    found = []
    for config in given:
        manifest = read_features(config.manifest)
        manifest.check_weights(weight_hash, where="the model that is served")
        key = config.direction if config.feature is None else config.feature
        assert key is not None
        entry = manifest.entry(key)
        where = f"`clamps`: {entry.title} of {config.manifest}"
        if isinstance(entry, Feature) != (config.feature is not None):
            raise ConfigError(f"{where} is asked for by the wrong key", fix="`feature` or `direction`, as it is listed")
        if entry.status not in MAY_ACT:
            raise ConfigError(
                f"{where} is `{entry.status}`, and only {' or '.join(f'`{s}`' for s in MAY_ACT)} ones may act",
                fix="enter causal evidence and `sglang-probe manifest move` it to `validated`",
            )
        if entry.action is None:
            raise ConfigError(f"{where} has no `clamp`, which says what is done to it")
        if isinstance(entry, Direction):
            vector = _direction(entry, vectors, where)
        else:
            vector = _feature(entry, manifest, config, where)
        library.check_vector(vector, width=width, layers=layers, weight_hash=weight_hash)
        found.append(Clamp(config, manifest, entry, vector))
    return found


def spec_of_clamps(clamps: Sequence[Clamp], probes: Mapping[str, Vector]) -> Spec | None:
    """What is done to a request whose gate opens; None: nothing.

    Raises:
        ConfigError: a probe is not in the library, is none, or has no threshold; or they have several.
    """
    names = sorted({c.config.probe for c in clamps})
    if len(names) > 1:
        raise ConfigError(f"`clamps` have the gates {', '.join(names)}: a request has one probe")
    if not clamps:
        return None
    probe = probe_of(names[0], probes, "steer.clamps")
    steps = [Step(**{**_fields(c.step), "probe": probe}) for c in clamps]
    return Spec(tuple(sorted(steps, key=lambda s: s.layer)))


def _fields(step: Step) -> dict[str, Any]:
    return {name: getattr(step, name) for name in Step.__dataclass_fields__}


def _direction(entry: Direction, vectors: Mapping[str, Vector], where: str) -> Vector:
    if entry.vector not in vectors:
        raise ConfigError(f"{where} is not in the library, which has {', '.join(sorted(vectors)) or 'nothing'}")
    vector = vectors[entry.vector]
    entry.check(vector)
    return vector


def _feature(entry: Feature, manifest: FeatureManifest, given: ClampConfig, where: str) -> Vector:
    from sglang_probe.steering.make import read_sae_feature

    assert given.sae is not None
    assert manifest.sae_sha256 is not None
    if (digest := weights_sha256(given.sae)) != manifest.sae_sha256:
        raise ConfigError(
            f"{where} is of an SAE with weights {manifest.sae_sha256[:12]}, and {given.sae} has {digest[:12]}",
            fix="give the SAE of the manifest",
        )
    found = read_sae_feature(given.sae, entry.index, hook_point=manifest.hook_point)
    if found.hook_point != manifest.hook_point:
        raise ConfigError(f"{where} is of `{manifest.hook_point}`, and {given.sae} of `{found.hook_point}`")
    return vector_of(manifest, entry, found.tensors)


def vector_of(manifest: FeatureManifest, feature: Feature, read: Mapping[str, torch.Tensor]) -> Vector:
    """The feature as a library would have it, with the threshold of its clamp; in memory alone: no client can name it.

    Args:
        read: its tensors (`make.read_sae_feature`).
    """
    import torch
    from safetensors.torch import save

    assert feature.clamp is not None
    assert manifest.hook_point is not None
    tensors = dict(read)
    own = tensors[library.THRESHOLD]
    tensors[library.THRESHOLD] = torch.maximum(own.float(), torch.tensor(feature.clamp.threshold))
    tensors = {n: t.detach().to("cpu", torch.float32).contiguous().clone() for n, t in tensors.items()}
    w = tensors[library.VECTOR]
    card = Card(
        name=f"clamp-{feature.index}",
        kind="feature",
        hook_point=manifest.hook_point,
        width=w.shape[0],
        model=manifest.model,
        model_weight_hash=manifest.model_weight_hash,
        norm=float(w.double().norm()),
        percentile99=feature.percentile99,
        made_by=MadeBy(command="steer.clamps", inputs={"manifest": manifest.sha256, "feature": feature.index}),
        sha256=hashlib.sha256(save(tensors)).hexdigest(),
    )
    return Vector(card, tensors)
