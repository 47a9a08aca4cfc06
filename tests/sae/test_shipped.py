"""The SAEs that come along: what their folders say of them holds on rows that `transformers` computes here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_probe.paths import shipped
from sglang_probe.run import journal
from sglang_probe.sae.evaluation import evaluate
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.sae.manifest import of
from sglang_probe.sae.match import compare
from sglang_probe.sae.sae import SAE
from sglang_probe.workload.corpus import load_corpus

FOLDER = shipped("models/sae-probe-text")
SEEDS = ("seed-0", "seed-1")


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """What block 2 of probe-text gives for 24 excerpts of the standard library, position 0 left out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = shipped("models/probe-text/checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    texts = [d.text[:1500] for d in load_corpus("stdlib").documents if len(d.text) > 3000]
    texts = sorted(texts, key=lambda t: hashlib.sha256(t.encode()).digest())[:24]
    with torch.no_grad():
        hidden = [model(**tokenizer(t, return_tensors="pt"), output_hidden_states=True).hidden_states for t in texts]
    return torch.cat([h[3][0, 1:] for h in hidden])


@pytest.fixture(scope="module")
def saes() -> dict[str, SAE]:
    return {seed: read_sae(FOLDER / seed) for seed in SEEDS}


def told(seed: str) -> dict[str, Any]:
    evaluation = json.loads((FOLDER / "evaluation.json").read_text())
    return next(d for d in evaluation["dictionaries"] if d["seed"] == int(seed[-1]))


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_the_one_that_was_judged_and_of_the_model_that_comes_along(seed: str, saes: dict[str, SAE]) -> None:
    assert weights_sha256(FOLDER / seed) == told(seed)["weights_sha256"]
    manifest = of(saes[seed])
    assert manifest is not None
    weights = Path(shipped("models/probe-text/checkpoint/model.safetensors"))
    assert manifest["model"]["weights_sha256"]["model.safetensors"] == journal.sha256(weights)
    assert saes[seed].hook_point == "blocks.2.hook_resid_post"
    # Stored in bfloat16: norms are 1 to within its rounding.
    assert float((saes[seed].decoder_norms - 1).abs().max()) < 2**-8


@pytest.mark.parametrize("seed", SEEDS)
def test_it_explains_rows_of_the_model_as_well_as_its_folder_says(
    seed: str, saes: dict[str, SAE], rows: torch.Tensor
) -> None:
    found = evaluate(saes[seed], rows)
    assert found.explained_variance == pytest.approx(told(seed)["explained_variance"], abs=0.04)
    assert found.l0 == pytest.approx(16, rel=0.15)


def test_the_seeds_agree_more_than_chance_and_far_less_than_the_same_dictionary_twice(
    saes: dict[str, SAE], rows: torch.Tensor
) -> None:
    alive = [evaluate(s, rows).fired > 0 for s in saes.values()]
    found = compare(*saes.values(), *alive, rotations=1)
    assert found["mcc_chance_most"] + 0.1 < found["mcc"] < 0.95
    assert np.mean(alive) > 0.9
