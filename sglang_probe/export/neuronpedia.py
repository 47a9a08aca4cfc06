"""Features as Neuronpedia's import folder: what the admin panel of a Neuronpedia server takes in.

    <model>/<layer>-<set>/{release,model,sourceset,source}.jsonl
    <model>/<layer>-<set>/{features,activations,explanations}/batch-N.jsonl.gz
    <model>/<layer>-<set>.scores.jsonl

Fields as in its own converter (`neuronpedia-utils`, `convert-llamascope-arrow-to-neuronpedia-export.py`); lists for
what is not known here are empty. Floats are cut to four places. Explanations are the heuristic labels, and say so, and
those that a model gave, with its name.

Its import takes explanations without scores (so does its own `export-data.py`). They are beside the folder, with the
fields of its table `ExplanationScore` and its names of delphi's two scores; `jsonDetails` has the nulls.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sglang_probe.export.folder import model_name, new_folder
from sglang_probe.run.hook_points import parse_hook_point
from sglang_probe.sae.folder import read_sae
from sglang_probe.sae.labels import AFTER, BEFORE
from sglang_probe.studies.features.labelled import Labelled
from sglang_probe.studies.features.study import HEURISTIC, FeaturesResult

PER_FILE = 2048
NO_MODEL = "heuristic (no model)"
SCORES = {"detection": "eleuther_recall", "fuzzing": "eleuther_fuzz"}
"""Names that a Neuronpedia server gives the scores."""
_EMPTY = [
    "topkCosSimIndices",
    "topkCosSimValues",
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
]
_NO_VALUE = [
    "dfaTargetIndex",
    "dfaMaxValue",
    "logitContributions",
    "qualifyingTokenIndex",
    "dataIndex",
    "zIndices",
    "zValues",
]


def export_neuronpedia(
    result: FeaturesResult,
    sae: Path,
    folder: Path,
    *,
    name: str,
    creator: str,
    creator_id: str = "",
    labelled: Labelled | None = None,
    per_file: int = PER_FILE,
    overwrite: bool = False,
) -> Path:
    """Write the folder; returns where the source is in it.

    Args:
        sae: folder of the SAE that the result is about; its decoder rows are the vectors.
        name: of the set of dictionaries, without the layer.
        creator: who made it.
        creator_id: of the user on that server; its import sets its own where this is empty.
        labelled: labels of the same SAE by a model, beside the heuristic ones.

    Raises:
        ConfigError: the folder is there.
    """
    vectors = read_sae(sae).W_dec.float().numpy()
    now = datetime.now(UTC).isoformat()
    layer = parse_hook_point(result.hook_point).layer
    source, model = f"{'e' if layer is None else layer}-{name}", model_name(result.model)
    made_by = {"creatorId": creator_id, "createdAt": now}
    shared = {"modelId": model, "layer": source}
    with new_folder(folder, overwrite=overwrite) as made:
        place = made / model / source
        place.mkdir(parents=True)
        told = f"{result.sae} on {result.hook_point} (sglang-probe)"
        _one(
            place / "release.jsonl",
            {"name": name, "description": told, "descriptionShort": told, "urls": [], "creatorNameShort": creator}
            | {"creatorName": creator, **made_by},
        )
        names = {"id": model, "instruct": False, "displayNameShort": model, "displayName": model}
        _one(place / "model.jsonl", {**names, **made_by, "updatedAt": now})
        _one(
            place / "sourceset.jsonl",
            {"modelId": model, "name": name, "creatorName": creator, "releaseName": name, "description": told}
            | {"visibility": "PUBLIC", **made_by},
        )
        _one(
            place / "source.jsonl",
            {"modelId": model, "setName": name, "visibility": "PUBLIC", "dataset": ", ".join(result.runs), "id": source}
            | {"num_prompts": len(result.coded.texts), "num_tokens_in_prompt": None, "hfRepoId": None}
            | {"hfFolderId": None, "creatorId": creator_id},
        )
        alive = result.latents[result.latents["rate"] > 0]
        by_model = {} if labelled is None else {int(r["latent"]): r for r in labelled.labels.to_dict("records")}
        scores: list[dict[str, Any]] = []
        examples = dict(iter(result.examples[result.examples["bin"] == "top"].groupby("latent")))
        for number, at in enumerate(range(0, len(alive), per_file)):
            part = alive.iloc[at : at + per_file].to_dict("records")
            file = f"batch-{number}.jsonl.gz"
            features = [{**shared, **made_by, **_feature(result, r, vectors[int(r["latent"])])} for r in part]
            _many(place / "features" / file, features)
            activations = [
                {**shared, **made_by, "index": int(r["latent"]), **a}
                for r in part
                for a in _activations(result, examples[int(r["latent"])])
            ]
            _many(place / "activations" / file, activations)
            explanations = []
            for r in part:
                given = [(NO_MODEL, r, _means(result, HEURISTIC))]
                if labelled is not None and (theirs := by_model.get(int(r["latent"]))) is not None:
                    given.append((labelled.model, theirs, {s: labelled.nulls(s) for s in SCORES}))
                for who, label, means in given:
                    explained = _explanation(result, label, who, creator_id)
                    explanations.append({**shared, "createdAt": now, **explained})
                    scores += _scores(explained["id"], label, who, means, creator_id, now)
            _many(place / "explanations" / file, explanations)
        lines = "".join(json.dumps(s, allow_nan=False) + "\n" for s in scores)
        place.with_name(f"{source}.scores.jsonl").write_text(lines, encoding="utf-8")
    return folder / model / source


def cut_float(x: float) -> float:
    """To four places, towards zero, as its converter does."""
    return math.trunc(x * 10_000) / 10_000


def _feature(result: FeaturesResult, r: dict[str, Any], vector: Any) -> dict[str, Any]:
    m = int(r["latent"])
    found: dict[str, Any] = {
        "index": m,
        "maxActApprox": cut_float(float(r["most"])),
        "frac_nonzero": float(r["rate"]),
        "hookName": result.hook_point,
        "hasVector": True,
        "vector": [float(v) for v in vector],
        "vectorLabel": None,
        **{name: [] for name in ("pos_str", "pos_values", "neg_str", "neg_values", *_EMPTY)},
    }
    if result.promoted is not None:
        p = result.promoted
        for kind, ids, values in (("pos", p.top[m], p.top_value[m]), ("neg", p.bottom[m], p.bottom_value[m])):
            found[f"{kind}_str"] = [result.vocabulary.text(int(t)) for t in ids]
            found[f"{kind}_values"] = [cut_float(float(v)) for v in values]
    return found


def _activations(result: FeaturesResult, examples: Any) -> Iterable[dict[str, Any]]:
    coded = result.coded
    for e in examples.itertuples(index=False):
        a, b = coded.window(int(e.flat), 4 * BEFORE, 4 * AFTER)
        rows = coded.row_of[a:b]
        values = np.where(rows >= 0, coded.codes[np.maximum(rows, 0), np.full(len(rows), e.latent)], 0.0)
        cut = [cut_float(float(v)) for v in values]
        yield {
            "id": _id(result.weights, e.latent, e.rid, e.position),
            "tokens": [result.vocabulary.text(int(t)) for t in coded.ids[a:b]],
            "values": cut,
            "maxValue": max(cut),
            "maxValueTokenIndex": int(np.argmax(cut)),
            "minValue": min(cut),
            "dfaValues": [],
            "lossValues": [],
            "binMin": None,
            "binMax": None,
            "binContains": None,
            "dataSource": f"{e.rid}, position {e.position}, row computed",
            **dict.fromkeys(_NO_VALUE),
        }


def _explanation(result: FeaturesResult, r: dict[str, Any], who: str, author: str) -> dict[str, Any]:
    heuristic = who == NO_MODEL
    return {
        "id": _id(result.weights, r["latent"], "explanation", 0 if heuristic else who),
        "index": int(r["latent"]),
        "description": str(r["label"]).replace("`", "") if heuristic else str(r["label"]),
        "authorId": author,
        "typeName": "sglang-probe_token-set" if heuristic else "sglang-probe_label",
        "explanationModelName": who,
    }


def _means(result: FeaturesResult, label: str) -> dict[str, dict[str, float]]:
    """What all labels of a kind score in the mean, beside the nulls, by score."""
    rows = result.scores[result.scores["label"] == label].set_index("score").drop(columns="label")
    return {name: {k: float(v) for k, v in row.items() if v == v} for name, row in rows.iterrows()}


def _scores(
    explanation: str, r: dict[str, Any], who: str, means: dict[str, dict[str, float]], user: str, now: str
) -> Iterable[dict[str, Any]]:
    for name, theirs in SCORES.items():
        value, other = float(r[name]), float(r[f"{name}_shuffled"])
        if not math.isnan(value):
            details = {"score": f"balanced accuracy of {name}", "windows": int(r["windows"])}
            details |= {"by_the_label_of_another_feature": None if math.isnan(other) else other, "means": means[name]}
            yield {
                "id": _id(explanation, name),
                "value": value,
                "explanationId": explanation,
                "explanationScoreTypeName": theirs,
                "explanationScoreModelName": who,
                "initiatedByUserId": user,
                "jsonDetails": json.dumps(details),
                "createdAt": now,
            }


def _id(*of: Any) -> str:
    return "c" + hashlib.sha256(" ".join(map(str, of)).encode()).hexdigest()[:24]


def _one(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")


def _many(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(r, allow_nan=False) + "\n" for r in records)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))
