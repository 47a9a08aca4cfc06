"""A model that was not trained has the configuration and tokenizer of the trained one, and no weight of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sglang_probe.errors import ConfigError
from sglang_probe.model.randomise import randomise
from sglang_probe.paths import shipped

TRAINED = shipped("models/probe-text/checkpoint")


def test_nothing_but_what_is_not_learned_is_the_trained_models(tmp_path: Path) -> None:
    made, kept = (
        load_file(randomise(TRAINED, tmp_path / name, seed=3, keep_embeddings=keep) / "model.safetensors")
        for name, keep in (("made", False), ("kept", True))
    )
    trained = load_file(TRAINED / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (v.shape, v.dtype) for k, v in trained.items()}
    learned = [k for k, v in made.items() if not torch.equal(v, torch.ones_like(v))]  # gains of norms begin as ones
    assert len(learned) > 4
    assert not any(torch.equal(made[k], trained[k]) for k in learned)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(kept[embedding], trained[embedding])
    assert all(torch.equal(kept[k], made[k]) for k in learned if k != embedding)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "made" / name).read_bytes() == (TRAINED / name).read_bytes()
    # The same seed is the same model; what is there is not written over.
    again = load_file(randomise(TRAINED, tmp_path / "again", seed=3) / "model.safetensors")
    assert all(torch.equal(again[k], made[k]) for k in made)
    with pytest.raises(ConfigError, match="is there"):
        randomise(TRAINED, tmp_path / "again")
    with pytest.raises(ConfigError, match="no model that transformers can read"):
        randomise(tmp_path, tmp_path / "other")
