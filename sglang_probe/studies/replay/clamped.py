"""The clamps of a server (`steer: clamps`), as entries of a library that a replay's requests can name.

A direction is an entry of the server's own library. A feature is none: the server makes an entry in memory, from the
SAE and the manifest of its day, and its run's manifest says of which feature, with the hash that the ledger has. Here
it is made again from the SAE and the manifest that is audited by, and written beside copies of the library's own
entries.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.errors import ConfigError
from sglang_probe.sae.folder import weights_sha256
from sglang_probe.steering import library
from sglang_probe.steering.clamps import vector_of
from sglang_probe.steering.features import Direction, Feature, FeatureManifest
from sglang_probe.steering.library import Library, Vector
from sglang_probe.steering.make import read_sae_feature


@dataclass(frozen=True)
class Clamped:
    """What a server clamped of itself."""

    library: Library
    features: Mapping[str, Feature]
    """Of the manifest, by the hash that the ledger has, and by that of the entry here."""
    served: Mapping[str, Vector]
    """Of features, the entry of `library` by that hash."""
    differences: tuple[str, ...]
    """Where the server's clamps are not the manifest's."""


def clamps_of(told: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The clamps that a run's manifest has; empty: none."""
    return list((told.get("steer") or {}).get("clamps") or ())


def clamped(
    clamps: Sequence[Mapping[str, Any]], manifest: FeatureManifest, given: Library, sae: Path | None, folder: Path
) -> Clamped:
    """The features and directions that a server clamped, as the manifest states them.

    Args:
        clamps: of the run's manifest.
        given: the library of the server, where directions are.
        folder: where the library of the replay is written, if features need one; what is there is replaced.

    Raises:
        ConfigError: of features no SAE is given, or another than the manifest's; or none of the clamps is of the
            manifest.
    """
    known: list[tuple[Mapping[str, Any], Feature | Direction]] = []
    for clamp in clamps:
        key = str(clamp["feature"] if "feature" in clamp else clamp["direction"])
        listed = [e for e in manifest.entries if e.key == key and e.action is not None]
        same_sae = clamp.get("sae_sha256") == manifest.sae_sha256
        same = [e for e in listed if (same_sae if isinstance(e, Feature) else e.sha256 == clamp["hash"])]
        known += [(clamp, e) for e in same]
    features = [(clamp, e) for clamp, e in known if isinstance(e, Feature)]
    if sae is None and any("feature" in c for c in clamps):
        raise ConfigError(
            "the run is of a server that clamped features of itself, which are in no library",
            fix="give the folder of their SAE (`--sae`)",
        )
    if sae is not None and (digest := weights_sha256(sae)) != manifest.sae_sha256:
        of = "no SAE" if manifest.sae_sha256 is None else f"an SAE with weights {manifest.sae_sha256[:12]}"
        raise ConfigError(f"the manifest is of {of}, and {sae} has {digest[:12]}", fix="give the SAE of the manifest")
    if not known:
        raise ConfigError(
            f"the server clamped {', '.join(str(c['label']) for c in clamps)}, and nothing that the manifest states a "
            "clamp of",
            fix="give the manifest that the server had, or a later revision of it",
        )
    differences = []
    for clamp, entry in known:
        assert entry.action is not None
        if clamp["clamp"] != (stated := entry.action.model_dump(mode="json")):
            differences.append(
                f"{entry.title}: the server had {_shown(clamp['clamp'])}, and the manifest {_shown(stated)}"
            )
    if not features:
        return Clamped(given, {}, {}, tuple(differences))
    assert sae is not None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in sorted(given.folder.iterdir()):
        if not file.name.startswith("."):
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
    by_hash: dict[str, Feature] = {}
    served: dict[str, Vector] = {}
    for clamp, feature in features:
        read = read_sae_feature(sae, feature.index, hook_point=manifest.hook_point)
        made = vector_of(manifest, feature, read.tensors)
        told = made.card.model_dump(mode="json", exclude={"width", "norm", "sha256"})
        entry_here = library.write(folder, made.tensors, **told)
        served[str(clamp["hash"])] = entry_here
        by_hash |= {str(clamp["hash"]): feature, entry_here.hash: feature}
    return Clamped(Library.open(folder), by_hash, served, tuple(differences))


def _shown(clamp: Mapping[str, Any]) -> str:
    return " ".join(f"{k} {v}" for k, v in clamp.items() if v is not None)
