"""The clamps of a server (`steer: clamps`), as entries of a library that a replay's requests can name.

A server makes such an entry in memory, from the SAE and the manifest of its day, and its run's manifest says of which
feature, with the hash that the ledger has. Here it is made again from the SAE and the manifest that is audited by, and
written beside copies of the library's own entries.
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
from sglang_probe.steering.features import Feature, FeatureManifest
from sglang_probe.steering.library import Library, Vector
from sglang_probe.steering.make import read_sae_feature


@dataclass(frozen=True)
class Clamped:
    """What a server clamped of itself."""

    library: Library
    features: Mapping[str, Feature]
    """Of the manifest, by the hash that the ledger has, and by that of the entry here."""
    served: Mapping[str, Vector]
    """Entry of `library`, by that hash."""
    differences: tuple[str, ...]
    """Where the server's clamps are not the manifest's."""


def clamps_of(told: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The clamps that a run's manifest has; empty: none."""
    return list((told.get("steer") or {}).get("clamps") or ())


def clamped(
    clamps: Sequence[Mapping[str, Any]], manifest: FeatureManifest, given: Library, sae: Path | None, folder: Path
) -> Clamped:
    """The features that a server clamped, as the manifest states them.

    Args:
        clamps: of the run's manifest.
        folder: where the library of the replay is written; what is there is replaced.

    Raises:
        ConfigError: no SAE is given, it is another than the manifest's, or none of the clamps is of the manifest.
    """
    if sae is None:
        raise ConfigError(
            "the run is of a server that clamped features of itself, which are in no library",
            fix="give the folder of their SAE (`--sae`)",
        )
    if (digest := weights_sha256(sae)) != manifest.sae_sha256:
        raise ConfigError(
            f"the manifest is of an SAE with weights {manifest.sae_sha256[:12]}, and {sae} has {digest[:12]}",
            fix="give the SAE of the manifest",
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in sorted(given.folder.iterdir()):
        if not file.name.startswith("."):
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
    listed = {f.index: f for f in manifest.features if f.clamp is not None}
    features: dict[str, Feature] = {}
    served: dict[str, Vector] = {}
    differences = []
    for clamp in clamps:
        index, digest = int(clamp["feature"]), str(clamp["hash"])
        feature = listed.get(index)
        if feature is None or clamp["sae_sha256"] != manifest.sae_sha256:
            continue
        assert feature.clamp is not None
        if clamp["clamp"] != (stated := feature.clamp.model_dump(mode="json")):
            differences.append(
                f"feature {index}: the server had {_shown(clamp['clamp'])}, and the manifest {_shown(stated)}"
            )
        made = vector_of(manifest, feature, read_sae_feature(sae, index, hook_point=manifest.hook_point).tensors)
        told = made.card.model_dump(mode="json", exclude={"width", "norm", "sha256"})
        served[digest] = entry = library.write(folder, made.tensors, **told)
        features |= {digest: feature, entry.hash: feature}
    if not served:
        raise ConfigError(
            f"the server clamped {', '.join(str(c['label']) for c in clamps)}, and nothing that the manifest states a "
            "clamp of",
            fix="give the manifest that the server had, or a later revision of it",
        )
    return Clamped(Library.open(folder), features, served, tuple(differences))


def _shown(clamp: Mapping[str, Any]) -> str:
    return " ".join(f"{k} {v}" for k, v in clamp.items() if v is not None)
