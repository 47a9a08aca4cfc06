"""The audit of what the clamped server stored, and that it finds and refuses what it should."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from sglang_probe.errors import ConfigError
from sglang_probe.harvest.host import EngineHost
from sglang_probe.run.run import load_run
from sglang_probe.steering.features import FeatureManifest
from sglang_probe.studies.replay import runs
from sglang_probe.studies.replay.command import Replay
from sglang_probe.studies.replay.study import ReplayResult, study_replay

REQUESTS = 64


def audited(
    folder: Path, features: FeatureManifest, segment: Path, library: Path, sae: Path, model: Path
) -> dict[str, Any]:
    """`sglang-probe replay` of the stored requests, under the manifest; under one whose value is a hundredth off; and
    under the manifest with a model of other weights."""
    stored = load_run(segment)
    told = features.model_dump(mode="json")
    told["features"][0]["clamp"]["value"] *= 1.01
    found: dict[str, Any] = {}
    with EngineHost() as host:
        for name, manifest in (("honest", features), ("tampered", FeatureManifest.model_validate(told))):
            place = folder / "replay" / name
            shutil.rmtree(place, ignore_errors=True)
            replay = runs.prepare(
                manifest, stored, library, place, sae=sae, model=str(model.resolve()), requests=REQUESTS
            )
            result = study_replay(replay, runs.run(replay, place, host=host))
            Replay().write(result, place)
            found[name] = _told(result)
    other = folder / "other-weights"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    try:
        runs.prepare(features, stored, library, folder / "replay" / "refused", sae=sae, model=str(other.resolve()))
        found["other weights"] = "not refused"
    except ConfigError as e:
        found["other weights"] = f"refused: {e}"
    return found


def _told(result: ReplayResult) -> dict[str, Any]:
    json = result.to_json()
    keys = ("features_revision", "requests", "under_interventions", "rows", "activations", "differences")
    violations = [c["violation"] for c in json["checks"] if not c["holds"]]
    return {"ok": result.ok, **{k: json[k] for k in keys}, "violations": violations}
