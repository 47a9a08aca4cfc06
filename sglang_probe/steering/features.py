"""`features.json`: what is known of features of one SAE and of directions, and which of them may act on traffic.

One file for a model, and for one SAE of it at most, with a hash over everything that it says and the hash of the
revision before it. A feature is a latent of the SAE; a direction is a vector of a library (`steering/library.py`), by
its name and hash, with the recipe of its card. Both are a `hypothesis` until causal evidence is entered, then can be
`validated`, then `deployed`; `retired` is for good. What a status needs is checked whenever the file is read, so that
one edited by hand is refused too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from sglang_probe.config import Config, parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.run import journal
from sglang_probe.steering.actions import Action, Clamp
from sglang_probe.steering.card import MadeBy, VectorName, residual_point
from sglang_probe.steering.evidence import LEAST_UNITS, SHA256, Evidence, Measured

if TYPE_CHECKING:
    from sglang_probe.steering.library import Vector

Status = Literal["hypothesis", "validated", "deployed", "retired"]
NEXT: dict[str, tuple[str, ...]] = {
    "hypothesis": ("validated", "retired"),
    "validated": ("deployed", "hypothesis", "retired"),
    "deployed": ("validated", "retired"),
    "retired": (),
}
"""What each status may become. Deployment comes only after validation."""


class Labelled(Config):
    """Who gave the label."""

    by: Literal["human", "model"]
    name: str = Field(min_length=1)
    prompt_sha256: str | None = Field(default=None, pattern=SHA256)
    """Of the prompt that a model was given."""

    @model_validator(mode="after")
    def _a_model_has_a_prompt(self) -> Labelled:
        if (self.by == "model") != (self.prompt_sha256 is not None):
            raise ValueError("a label by a model has the `prompt_sha256` of what it was asked, one by a human none")
        return self


class Entry(Config):
    """What features and directions have in common."""

    label: str = Field(min_length=1)
    labelled: Labelled
    owner: str = Field(min_length=1)
    evidence: list[Evidence] = Field(default_factory=list)
    status: Status = "hypothesis"

    @property
    def key(self) -> str:
        """What names it in the manifest."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """For messages."""
        raise NotImplementedError

    @property
    def action(self) -> Clamp | Action | None:
        """What is done by it where it is deployed; None: that is not stated."""
        raise NotImplementedError

    def counts(self, evidence: Evidence, sae_sha256: str | None) -> bool:
        """Whether evidence was measured of this: the vector, and the mode and value of `clamp` if there is one."""
        of, action = evidence.of, self.action
        if of is None or not self._is_of(of, sae_sha256):
            return False
        return action is None or (of.mode, of.value) == (action.mode, action.value)

    def _is_of(self, of: Measured, sae_sha256: str | None) -> bool:
        raise NotImplementedError

    @model_validator(mode="after")
    def _has_what_its_status_needs(self) -> Entry:
        if self.status == "deployed" and self.action is None:
            raise ValueError(f"{self.title} cannot be `deployed`: `clamp` says what is done to it")
        return self


class Feature(Entry):
    """One latent of interest."""

    index: int = Field(ge=0)
    rate: float | None = Field(default=None, ge=0, le=1)
    """Share of rows in which it fires."""
    percentile99: float | None = Field(default=None, gt=0)
    """Of its activation, over the rows in which it fires."""
    clamp: Clamp | None = None

    @property
    def key(self) -> str:
        return str(self.index)

    @property
    def title(self) -> str:
        return f"feature {self.index}"

    @property
    def action(self) -> Clamp | None:
        return self.clamp

    def _is_of(self, of: Measured, sae_sha256: str | None) -> bool:
        return (of.feature, of.sae_sha256) == (self.index, sae_sha256)


class Direction(Entry):
    """One direction of interest: an entry of a library of vectors (contrastive, of a probe, of a decoder row)."""

    vector: VectorName
    """Its name in the library."""
    sha256: str = Field(pattern=SHA256)
    """Hash of the entry, its card and its tensors: another vector of the same name is refused."""
    hook_point: Annotated[str, AfterValidator(residual_point)]
    made_by: MadeBy
    """Its recipe, as its card has it: the command, what it read (runs with the hash of their manifests), and seeds."""
    clamp: Action | None = None

    @classmethod
    def of(cls, vector: Vector, **fields: Any) -> Direction:
        """A direction of a library.

        Args:
            fields: those that no card has: `label`, `labelled`, `owner`, and if they are known `evidence`, `clamp`.

        Raises:
            ConfigError: the entry is no direction, or a field is wrong.
        """
        if vector.card.kind != "direction":
            raise ConfigError(
                f"`{vector.name}` is a {vector.card.kind}, and no direction",
                fix="a latent is listed under `features`; of a probe, write the weights as a direction",
            )
        of_card = {"vector": vector.name, "sha256": vector.hash, "hook_point": vector.card.hook_point}
        told = {**of_card, "made_by": vector.card.made_by.model_dump(mode="json"), **fields}
        return parse_config(told, cls, where=f"direction `{vector.name}`")

    def check(self, vector: Vector) -> None:
        """Refuse another vector than the one that evidence was entered of.

        Raises:
            ConfigError: its hash differs, or what the manifest says of its card.
        """
        if vector.hash != self.sha256:
            raise ConfigError(
                f"{self.title} has the hash {self.sha256[:12]} in the manifest and {vector.hash[:12]} in the library",
                fix="give the library that it was validated from, or enter the new vector and validate that",
            )
        card = vector.card
        if card.kind != "direction" or (card.hook_point, card.made_by) != (self.hook_point, self.made_by):
            raise ConfigError(f"what the manifest says of {self.title} (hook point, recipe) is not what its card says")

    @property
    def key(self) -> str:
        return self.vector

    @property
    def title(self) -> str:
        return f"direction `{self.vector}`"

    @property
    def action(self) -> Action | None:
        return self.clamp

    def _is_of(self, of: Measured, sae_sha256: str | None) -> bool:
        return of.sha256 == self.sha256


class FeatureManifest(Config):
    """What `features.json` holds."""

    version: Literal[1] = 1
    revision: int = Field(default=1, ge=1)
    previous: str | None = Field(default=None, pattern=SHA256)
    """`sha256` of the revision before; null in the first."""
    model: str
    model_weight_hash: str = Field(pattern=SHA256)
    """`sglang_probe.run.weights.weight_hash` of the model's files."""
    tokenizer_sha256: str | None = Field(default=None, pattern=SHA256)
    hook_point: str | None = None
    """Of the SAE; null without one. A direction has its own."""
    sae_sha256: str | None = Field(default=None, pattern=SHA256)
    """Of the SAE's weights; null without one."""
    training: dict[str, Any] = Field(default_factory=dict)
    """The SAE's own manifest (`sglang_probe.sae.manifest`): runs, mixture, evaluation."""
    features: list[Feature] = Field(default_factory=list)
    directions: list[Direction] = Field(default_factory=list)

    @model_serializer(mode="wrap")
    def _without_what_it_has_none_of(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The hash of a file from before there were directions stays what it was.
        told: dict[str, Any] = write(self)
        return told if told["directions"] else {k: v for k, v in told.items() if k != "directions"}

    @model_validator(mode="after")
    def _names_each_once(self) -> FeatureManifest:
        keys = [e.key for e in self.entries]
        if twice := next((e for e in self.entries if keys.count(e.key) > 1), None):
            raise ValueError(f"{twice.title} is listed twice")
        if (self.sae_sha256 is None) != (self.hook_point is None) or (self.features and self.sae_sha256 is None):
            raise ValueError("features are of an SAE: its `sae_sha256` and `hook_point`, both or, of directions, none")
        if (self.revision == 1) != (self.previous is None):
            raise ValueError("the first revision has no `previous`, and every other has one")
        return self

    @model_validator(mode="after")
    def _rests_on_evidence(self) -> FeatureManifest:
        for e in self.entries:
            if e.status not in ("validated", "deployed") or self.shown(e):
                continue
            old = any(x.of is None and x.shows_an_effect for x in e.evidence)
            raise ValueError(
                f"{e.title} cannot be `{e.status}`: no evidence of its own vector, mode and value, of at least "
                f"{LEAST_UNITS} texts, has an interval past zero and past its control"
                + ("; some does not say what it was measured of: enter that as its `of`" if old else "")
            )
        return self

    def shown(self, entry: Feature | Direction) -> list[Evidence]:
        """Evidence that an entry has the effect, measured of what is stated of it."""
        return [x for x in entry.evidence if x.shows_an_effect and entry.counts(x, self.sae_sha256)]

    @property
    def sha256(self) -> str:
        """Over the canonical JSON of everything else in the file."""
        told = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def entries(self) -> list[Feature | Direction]:
        """All of them."""
        return [*self.features, *self.directions]

    def entry(self, key: int | str) -> Feature | Direction:
        """A feature by its index, or a direction by its name.

        Raises:
            ConfigError: it is not listed.
        """
        found = [e for e in self.entries if e.key == str(key)]
        if not found:
            listed = ", ".join(e.key for e in self.entries) or "none"
            raise ConfigError(f"`{key}` is not in the manifest; it lists {listed}")
        return found[0]

    def moved(self, key: int | str, status: str) -> FeatureManifest:
        """The next revision, in which a feature or direction has another status.

        Raises:
            ConfigError: the status cannot follow, or it lacks what the status needs.
        """
        now = self.entry(key)
        if status not in NEXT[now.status]:
            raise ConfigError(
                f"{now.title} is `{now.status}` and cannot become `{status}`",
                fix=f"it can become {' or '.join(f'`{s}`' for s in NEXT[now.status]) or 'nothing else'}",
            )
        told = self.model_dump(mode="json")
        told |= {"revision": self.revision + 1, "previous": self.sha256}
        told["features" if isinstance(now, Feature) else "directions"][self._place(now)]["status"] = status
        return parse_config(told, FeatureManifest, where=f"{now.title} as `{status}`")

    def _place(self, entry: Feature | Direction) -> int:
        among: list[Any] = self.features if isinstance(entry, Feature) else self.directions
        return among.index(entry)

    def check_weights(self, weight_hash: str | None, *, where: str) -> None:
        """Refuse another model than the one that the manifest is of.

        Args:
            where: names the model or run at hand.

        Raises:
            ConfigError: its weights are others, or unknown.
        """
        if weight_hash != self.model_weight_hash:
            found = "unknown" if weight_hash is None else weight_hash[:12]
            raise ConfigError(
                f"the manifest is of `{self.model}` with weights {self.model_weight_hash[:12]}, and those of {where} "
                f"are {found}",
                fix="what is known of its entries does not carry over to other weights: validate it anew",
            )

    def check_run(self, name: str, manifest_sha256: str) -> int:
        """How many measurements are of a run.

        Args:
            name: of the run.
            manifest_sha256: of its `manifest.json`.

        Raises:
            ConfigError: one is of a run of this name, and of another manifest.
        """
        named = [(e, x) for e in self.entries for x in e.evidence if x.run == name]
        for entry, x in named:
            if x.manifest_sha256 != manifest_sha256:
                raise ConfigError(
                    f"evidence of {entry.title} is of a run `{name}` whose manifest has the hash "
                    f"{x.manifest_sha256[:12]}, and that of the run at hand has {manifest_sha256[:12]}",
                    fix="give the run that it was measured in, or enter the evidence anew",
                )
        return len(named)


def read_features(path: Path) -> FeatureManifest:
    """Read a manifest.

    Raises:
        ConfigError: it cannot be read, was changed without its hash, or an entry lacks what its status needs.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(told, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} is no manifest of features: {e}") from e
    stated = told.pop("sha256", None)
    found = parse_config(told, FeatureManifest, where=str(path))
    if stated != found.sha256:
        raise ConfigError(
            f"{path} was changed after it was written: its `sha256` is not that of what it says",
            fix="restore it from a copy, or write it by `sglang_probe.steering.features.write_features`",
        )
    return found


def write_features(manifest: FeatureManifest, path: Path) -> None:
    """Write a manifest with its hash; a reader sees the old file or the whole new one.

    Raises:
        ConfigError: a manifest is there, and this is not the revision that follows it: another number, a status that
            cannot follow, or a vector or value that was changed and may act without being validated anew.
    """
    if path.exists():
        check_follows(manifest, read_features(path), path)
    told = {**manifest.model_dump(mode="json"), "sha256": manifest.sha256}
    journal.write_text_durably(path, json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def check_follows(manifest: FeatureManifest, before: FeatureManifest, path: Path) -> None:
    """Refuse what is not the next revision of a manifest.

    Raises:
        ConfigError: as `write_features`.
    """
    if manifest.previous != before.sha256 or manifest.revision != before.revision + 1:
        raise ConfigError(
            f"{path} has another revision ({before.revision}) than the one that this (revision {manifest.revision}) "
            "follows",
            fix="read it again, and change that",
        )
    now = {(type(e), e.key): e for e in manifest.entries}
    were = {(type(e), e.key): e for e in before.entries}
    for key, old in were.items():
        if old.status == "retired" and (key not in now or now[key].status != "retired"):
            raise ConfigError(f"{old.title} is `retired`, which is for good", fix="keep it in the manifest as it is")
    allowed: tuple[str, ...]
    for key, entry in now.items():
        was = were.get(key)
        if was is None or _of(was, before) != _of(entry, manifest):
            allowed, why = ("hypothesis", "retired"), "new, or of another vector, value or weights than before"
        else:
            allowed, why = (was.status, *NEXT[was.status]), f"`{was.status}` in revision {before.revision}"
        if entry.status not in allowed:
            raise ConfigError(
                f"{entry.title} is {why}, and cannot be `{entry.status}` in the next revision",
                fix=f"write it as {' or '.join(f'`{s}`' for s in dict.fromkeys(allowed))} first",
            )


def _of(entry: Feature | Direction, manifest: FeatureManifest) -> tuple[Any, ...]:
    """What evidence of an entry is of: if that changes, it is to be validated anew."""
    vector = entry.sha256 if isinstance(entry, Direction) else (manifest.sae_sha256, manifest.hook_point)
    return manifest.model_weight_hash, vector, entry.action
