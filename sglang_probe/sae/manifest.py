"""What an SAE was made of: our manifest in its metadata, under one key, so that SAELens carries it along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_probe.errors import ConfigError
from sglang_probe.run import journal
from sglang_probe.run.manifest import MANIFEST, new_manifest
from sglang_probe.run.run import Run
from sglang_probe.sae.harvested import Harvested, Listed
from sglang_probe.sae.sae import SAE

KEY = "sglang_probe"
VERSION = 1


def facts_of_run(run: Run) -> dict[str, Any]:
    """Which rows these are, without a path of this machine: `manifest_sha256` names the run."""
    m = run.manifest
    return {
        "name": m.get("name") or run.path.name,
        "manifest_sha256": journal.sha256(run.path / MANIFEST),
        "policy": m.get("policy"),
        "dtype": m.get("dtype"),
        "positions_by_status": m.get("positions_by_status"),
        "positions_by_phase": m.get("positions_by_phase"),
        "workload_digest": m.get("workload_digest"),
    }


def model_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Name and hashes of the model that the rows come from; empty where no run says."""
    return next((dict(r.manifest["model"]) for r in runs if r.manifest.get("model")), {})


def manifest(
    runs: Sequence[Run], rows: Harvested | Listed, *, training: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of one SAE.

    Args:
        training: recipe, mixture, seeds, versions.
        evaluation: numbers, and what they were measured on.
    """
    return manifest_from(
        model_of(runs), [facts_of_run(run) for run in runs], rows, training=training, evaluation=evaluation
    )


def manifest_from(
    model: Mapping[str, Any],
    facts: Sequence[Mapping[str, Any]],
    rows: Harvested | Listed,
    *,
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> dict[str, Any]:
    """As `manifest`, of runs that are known by what `model_of` and `facts_of_run` said of them."""
    return {
        "manifest_version": VERSION,
        "made_by": f"sglang-probe {new_manifest()['versions']['sglang-probe']}",
        "model": {n: model[n] for n in ("name", "weights_sha256", "tokenizer_sha256") if n in model},
        "runs": [dict(f) for f in facts],
        "left_out": rows.left_out.to_dict("records"),
        "norm_limit": rows.norm_limit,
        "training": dict(training),
        "evaluation": dict(evaluation),
    }


def refuse_other_model(sae: SAE, runs: Sequence[Run], name: str) -> bool:
    """Refuse runs of other weights than those that the SAE was trained on; returns whether both are known.

    Args:
        name: of the SAE, for the message.

    Raises:
        ConfigError: they are others.
    """
    told = (of(sae) or {}).get("model") or {}
    theirs, ours = told.get("weights_sha256"), model_of(runs).get("weights_sha256")
    if theirs and ours and theirs != ours:
        raise ConfigError(
            f"{name} was trained on rows of `{told.get('name')}` with other weights than those of the runs",
            fix="judge it on runs of the model that it was trained on",
        )
    return bool(theirs and ours)


def of(sae: SAE) -> dict[str, Any] | None:
    """The manifest of an SAE that was made here; None of others."""
    return dict(sae.metadata[KEY]) if KEY in sae.metadata else None
