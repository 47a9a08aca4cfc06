"""The audit of what the clamped server stored, and that it finds and refuses what it should."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from sglang_probe.errors import ConfigError
from sglang_probe.harvest.host import EngineHost
from sglang_probe.run.run import load_run
from sglang_probe.steering import library as vectors
from sglang_probe.steering.features import FeatureManifest
from sglang_probe.studies.replay import runs
from sglang_probe.studies.replay.command import Replay
from sglang_probe.studies.replay.study import ReplayResult, study_replay

REQUESTS = 64


def audited(
    folder: Path, features: FeatureManifest, segment: Path, library: Path, model: Path, direction: str, other: str
) -> dict[str, Any]:
    """`sglang-probe replay` of the stored requests, under the manifest; under one whose value is a hundredth off; under
    the manifest with a model of other weights; and with another vector of the same name in the library.

    Args:
        direction: name of the one that was deployed.
        other: name of another vector of the library, which takes its place.
    """
    stored = load_run(segment)
    told = features.model_dump(mode="json")
    entry = next(d for d in told["directions"] if d["vector"] == direction)
    entry["clamp"]["value"] *= 1.01
    for evidence in entry["evidence"]:
        evidence["of"]["value"] = entry["clamp"]["value"]
    found: dict[str, Any] = {}
    with EngineHost() as host:
        for name, manifest in (("honest", features), ("tampered", FeatureManifest.model_validate(told))):
            place = folder / "replay" / name
            shutil.rmtree(place, ignore_errors=True)
            replay = runs.prepare(manifest, stored, library, place, model=str(model.resolve()), requests=REQUESTS)
            result = study_replay(replay, runs.run(replay, place, host=host))
            Replay().write(result, place)
            found[name] = _told(result)
    weights = folder / "other-weights"
    shutil.rmtree(weights, ignore_errors=True)
    shutil.copytree(model, weights)
    tensors = load_file(weights / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, weights / "model.safetensors", {"format": "pt"})
    swapped = folder / "other-vector"
    shutil.rmtree(swapped, ignore_errors=True)
    shutil.copytree(library, swapped)
    card = vectors.Library.open(library)[other]
    fields = card.card.model_dump(mode="json", exclude={"width", "norm", "sha256"}) | {"name": direction}
    vectors.write(swapped, card.tensors, overwrite=True, **fields)
    for name, lib, at in (("other weights", library, weights), ("other vector", swapped, model)):
        try:
            runs.prepare(features, stored, lib, folder / "replay" / "refused", model=str(at.resolve()))
            found[name] = "not refused"
        except ConfigError as e:
            found[name] = f"refused: {e}"
    return found


def _told(result: ReplayResult) -> dict[str, Any]:
    json = result.to_json()
    keys = ("features_revision", "requests", "under_interventions", "rows", "activations", "differences")
    violations = [c["violation"] for c in json["checks"] if not c["holds"]]
    return {"ok": result.ok, **{k: json[k] for k in keys}, "violations": violations}
