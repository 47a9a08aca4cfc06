"""A validated feature of a made-up SAE of the built-in model, a validated direction, and their manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_probe.config import parse_config
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.sae.folder import weights_sha256, write_sae
from sglang_probe.sae.sae import SAE
from sglang_probe.steering.features import Direction, FeatureManifest, write_features
from sglang_probe.steering.library import MadeBy, Vector, write
from sglang_probe.steering.probe import fit
from tests.end_to_end.steering import MODEL, POINTS, WIDTH
from tests.steering.test_features import measured

FEATURE, LAYER = 3, 1


def make_clamp(
    folder: Path,
    *,
    status: str = "validated",
    hook_point: str = POINTS[LAYER],
    directions: Sequence[Direction] = (),
    **more: Any,
) -> dict[str, Any]:
    """An entry of `steer: clamps`, without its probe: every latent is always active, so that a clamp changes rows. The
    manifest lists `directions` too."""
    generator = torch.Generator().manual_seed(7)
    w = torch.randn((WIDTH, 8), generator=generator)
    sae = SAE(
        "jumprelu",
        W_enc=w / 16,
        W_dec=w.T.contiguous() / w.norm(dim=0)[:, None],
        b_enc=torch.full((8,), 50.0),
        b_dec=torch.zeros(WIDTH),
        threshold=torch.full((8,), 1.0),
        metadata={"hook_name": hook_point, "model_name": "probe-text"},
    )
    write_sae(sae, folder / "sae")
    feature = {
        "index": FEATURE,
        "label": "planted",
        "labelled": {"by": "human", "name": "x"},
        "owner": "y",
        "clamp": {"mode": "clamp", "value": 0.0, "threshold": 5.0},
        "status": status,
        **more.pop("feature", {}),
    }
    of = {"feature": feature["index"], "sae_sha256": more.get("sae_sha256", weights_sha256(folder / "sae"))}
    feature.setdefault("evidence", [measured(feature["clamp"], **of)])
    told = {
        "model": "probe-text",
        "model_weight_hash": weight_hash_of_folder(MODEL),
        "hook_point": POINTS[LAYER],
        "sae_sha256": weights_sha256(folder / "sae"),
        "features": [feature],
        "directions": [d.model_dump(mode="json") for d in directions],
        **more,
    }
    write_features(parse_config(told, FeatureManifest, where="made"), folder / "features.json")
    return {"manifest": str(folder / "features.json"), "sae": str(folder / "sae"), "feature": FEATURE}


def make_direction(vector: Vector, **more: Any) -> Direction:
    """An entry of a manifest for a direction of a library."""
    told = {
        "label": "planted too",
        "labelled": {"by": "human", "name": "x"},
        "owner": "y",
        "clamp": {"mode": "cap", "value": -0.5},
        "status": "validated",
        **more,
    }
    return Direction.of(
        vector, **{"evidence": [measured(told["clamp"], sha256=told.get("sha256", vector.hash))], **told}
    )


def write_gate(library: Path, inside_ND: torch.Tensor, outside_ND: torch.Tensor, hook_point: str) -> None:
    """Add the probe `scope`, which tells rows in scope from others, with its threshold halfway between them.

    Raises:
        ValueError: it does not tell all of them apart, so that a gate would not be decided as a test means it.
    """
    w = torch.from_numpy(fit(inside_ND.double().numpy(), outside_ND.double().numpy())).float()
    least, most = (inside_ND @ w).min(), (outside_ND @ w).max()
    if least <= most:
        raise ValueError(f"scores in scope begin at {least:g}, and others end at {most:g}")
    write(
        library,
        {"vector": w, "threshold": (least + most) / 2},
        name="scope",
        kind="probe",
        hook_point=hook_point,
        model="probe-text",
        model_weight_hash=weight_hash_of_folder(MODEL),
        layer_mean_norm=1.0,
        made_by=MadeBy(command="test"),
    )
