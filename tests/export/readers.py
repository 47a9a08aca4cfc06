"""Readers that follow what other tools document of their formats, for tests: the tools themselves are not installed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray[Any, Any]


def delphi_latents(folder: Path, module: str) -> tuple[dict[int, tuple[Array, Array]], Array, dict[str, Any]]:
    """As delphi's `TensorBuffer.load`: locations `[n, 3]` and activations by latent, the tokens, the configuration.

    The first latent of a file is the first number of its name, and is added to the third column.
    """
    config = json.loads((folder / module / "config.json").read_text())
    found: dict[int, tuple[Array, Array]] = {}
    tokens = None
    for path in sorted((folder / module).glob("*.safetensors"), key=lambda p: int(p.stem.split("_")[0])):
        data = load_file(path)
        first, last = map(int, path.stem.split("_"))
        locations = data["locations"].astype(np.int64)
        locations[:, 2] += first
        assert ((locations[:, 2] >= first) & (locations[:, 2] <= last)).all()
        tokens = data["tokens"].astype(np.int64)
        for latent in np.unique(locations[:, 2]):
            at = locations[:, 2] == latent
            found[int(latent)] = (locations[at], data["activations"][at])
    assert tokens is not None
    return found, tokens, config


NEURONPEDIA = {
    "release.jsonl": {"name", "description", "descriptionShort", "urls", "creatorNameShort", "creatorName"}
    | {"creatorId", "createdAt"},
    "model.jsonl": {"id", "instruct", "displayNameShort", "displayName", "creatorId", "createdAt", "updatedAt"},
    "sourceset.jsonl": {"modelId", "name", "creatorId", "createdAt", "creatorName", "releaseName", "description"}
    | {"visibility"},
    "source.jsonl": {"modelId", "setName", "visibility", "dataset", "id", "num_prompts", "num_tokens_in_prompt"}
    | {"hfRepoId", "hfFolderId", "creatorId"},
    "features": {"modelId", "layer", "index", "creatorId", "createdAt", "maxActApprox", "hasVector", "vector"}
    | {"vectorLabel", "hookName", "topkCosSimIndices", "topkCosSimValues", "neuron_alignment_indices"}
    | {"neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_pearson"}
    | {"correlated_neurons_l1", "correlated_features_indices", "correlated_features_pearson"}
    | {"correlated_features_l1", "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero"}
    | {"freq_hist_data_bar_heights", "freq_hist_data_bar_values", "logits_hist_data_bar_heights"}
    | {"logits_hist_data_bar_values", "decoder_weights_dist"},
    "activations": {"id", "tokens", "modelId", "layer", "index", "maxValue", "maxValueTokenIndex", "minValue"}
    | {"values", "creatorId", "createdAt", "dfaValues", "dfaTargetIndex", "dfaMaxValue", "lossValues"}
    | {"logitContributions", "binMin", "binMax", "binContains", "qualifyingTokenIndex", "dataIndex", "dataSource"}
    | {"zIndices", "zValues"},
    "explanations": {"id", "modelId", "layer", "index", "description", "authorId", "typeName"}
    | {"explanationModelName", "createdAt"},
}
"""Every field that its database models have, by file or folder."""


def neuronpedia(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every record of an import folder, checked for its fields and against its source."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, fields in NEURONPEDIA.items():
        if name.endswith(".jsonl"):
            lines = (folder / name).read_text().splitlines()
        else:
            files = sorted((folder / name).iterdir())
            assert [p.name for p in files] == [f"batch-{i}.jsonl.gz" for i in range(len(files))]
            lines = [line for p in files for line in gzip.decompress(p.read_bytes()).decode().splitlines()]
        found[name] = [json.loads(line) for line in lines]
        for record in found[name]:
            assert record.keys() == fields, name
    source, model = found["source.jsonl"][0], found["model.jsonl"][0]
    assert source["id"] == folder.name == f"{source['id'].split('-')[0]}-{found['sourceset.jsonl'][0]['name']}"
    assert found["sourceset.jsonl"][0]["releaseName"] == found["release.jsonl"][0]["name"]
    for name in ("features", "activations", "explanations"):
        assert {(r["modelId"], r["layer"]) for r in found[name]} == {(model["id"], source["id"])}
    for a in found["activations"]:
        assert len(a["tokens"]) == len(a["values"])
        assert a["values"][a["maxValueTokenIndex"]] == a["maxValue"] == max(a["values"])
    return found


def speculators_samples(folder: Path) -> list[dict[str, Any]]:
    """As `ArrowDataset` of vLLM's speculators: each sample's file held against the dataset, the last layer apart."""
    from datasets import load_from_disk
    from safetensors.torch import load_file

    data, found = load_from_disk(folder), []
    assert list(data.with_format(None)["seq_len"]) == [len(ids) for ids in data.with_format(None)["input_ids"]]
    for i in range(len(data)):
        states = load_file(folder / "hidden_states" / f"hs_{i}.safetensors")
        assert states["token_ids"].equal(data[i]["input_ids"])
        assert len(states["hidden_states"]) == len(states["token_ids"])
        assert states["hidden_states"].isfinite().all()
        found.append(
            {
                "hidden_states": states["hidden_states"][:, :-1].flatten(1),
                "verifier_last_hidden_states": states["hidden_states"][:, -1],
                "input_ids": states["token_ids"],
                "loss_mask": data[i]["loss_mask"],
            }
        )
    return found
