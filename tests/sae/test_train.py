"""Training by SAELens in our own loop: what is exported is what SAELens would save, what is resumed is what was not
interrupted, and planted features are found."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.sae import train as training
from sglang_probe.sae.evaluation import evaluate
from sglang_probe.sae.match import chance, match
from sglang_probe.sae.recipe import TRAINED, Recipe
from sglang_probe.sae.threshold import recalibrated
from sglang_probe.sae.train import CHECKPOINT, Task, exported, norm_scale, train
from tests.sae.lens import needs_sae_lens
from tests.sae.planted import Planted

PLANTED = Planted.make()
ROWS = 40 * PLANTED.rows(8000, seed=1)  # far from norm sqrt(D), so that a forgotten scale shows
HELD_OUT = 40 * PLANTED.rows(1500, seed=2)


def task(folder: Path, architecture: Any = "batchtopk", steps: int = 60, **more: Any) -> Task:
    given: dict[str, Any] = {"seed": 0, "checkpoint_every": 25, **more}
    recipe = Recipe(
        architecture=architecture,
        k=3,
        samples=steps * 256,
        batch_size=256,
        lr=3e-3,
        lr_warm_up_steps=5,
        dead_after_steps=20,
        **given.pop("recipe", {}),
    )

    def batch(step: int) -> torch.Tensor:
        at = np.random.default_rng([7, step]).integers(0, len(ROWS), 256)
        return ROWS[torch.from_numpy(at)]

    return Task(recipe, 32, batch=batch, scale=norm_scale([ROWS]), held_out=HELD_OUT, folder=folder, **given)


@needs_sae_lens
@pytest.mark.slow
@pytest.mark.parametrize("architecture", TRAINED)
def test_what_is_exported_is_what_saelens_would_save(tmp_path: Path, architecture: str) -> None:
    from sae_lens import SAE as Theirs

    asked = task(tmp_path, architecture)
    trainer = training._trainer(asked)
    for step in range(30):
        trainer.step(asked.batch(step))
        trainer.n_training_steps += 1
    ours = exported(trainer.sae, asked.recipe, asked.scale)
    saved = copy.deepcopy(trainer.sae)
    saved.fold_activation_norm_scaling_factor(asked.scale)
    if architecture in ("standard", "jumprelu"):
        saved.fold_W_dec_norm()
    saved.save_inference_model(tmp_path / "saved")
    theirs = Theirs.load_from_disk(tmp_path / "saved")
    with torch.no_grad():
        z, made = theirs.encode(HELD_OUT), theirs(HELD_OUT)
    assert ours.architecture == theirs.cfg.architecture()
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(ours.reconstruct(HELD_OUT), made, rtol=1e-4, atol=1e-2)
    assert float(((ours.encode(HELD_OUT) > 0) == (z > 0)).float().mean()) > 0.9999
    assert evaluate(ours, HELD_OUT).l0 > 0


@needs_sae_lens
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_a_training_that_was_interrupted_ends_like_one_that_was_not(tmp_path: Path, architecture: str) -> None:
    class Ended(Exception):
        pass

    def end(at: dict[str, float]) -> None:
        if at["step"] >= 40:
            raise Ended

    whole = train(task(tmp_path / "whole", architecture))
    with pytest.raises(Ended):
        train(task(tmp_path / "parts", architecture), end)
    assert (tmp_path / "parts" / CHECKPOINT).is_dir()
    told: list[float] = []
    parts = train(task(tmp_path / "parts", architecture), lambda at: told.append(at["step"]))
    assert min(told) > 25  # went on from the checkpoint
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        assert torch.equal(getattr(parts.sae, name), getattr(whole.sae, name)), name
    assert parts.curve.equals(whole.curve)


@needs_sae_lens
@pytest.mark.slow
def test_planted_features_are_found_and_early_thresholds_are_wrong(tmp_path: Path) -> None:
    made = train(task(tmp_path, steps=800))
    sae = recalibrated(made.sae, HELD_OUT, 3)
    found = evaluate(sae, HELD_OUT)
    assert found.explained_variance > 0.9
    alive = sae.W_dec.numpy()[found.fired > 0]
    often = PLANTED.directions[PLANTED.rates > 0.05]
    assert match(often, alive).mcc > max(0.9, chance(often, alive).max() + 0.3)
    last, first = made.curve.iloc[-1], made.curve.iloc[0]
    assert last["held_out"] == pytest.approx(evaluate(made.sae, HELD_OUT).explained_variance)
    assert last["recalibrated"] == pytest.approx(found.explained_variance)
    # The trap: early in a training the running mean of the threshold is far too low.
    assert first["held_out_l0"] > 2 * 3
    assert first["held_out"] < first["recalibrated"] - 0.1


@needs_sae_lens
@pytest.mark.slow
def test_the_seed_decides_the_initialisation_and_nothing_else_does(tmp_path: Path) -> None:
    torch.manual_seed(123)
    one = train(task(tmp_path / "a", steps=8)).sae
    torch.manual_seed(321)
    again, other = train(task(tmp_path / "b", steps=8)).sae, train(task(tmp_path / "c", steps=8, seed=1)).sae
    assert torch.equal(one.W_enc, again.W_enc)
    assert not torch.equal(one.W_enc, other.W_enc)


def test_the_scale_gives_rows_a_mean_norm_of_the_root_of_their_width() -> None:
    scale = norm_scale(HELD_OUT.split(400))
    assert float((scale * HELD_OUT).norm(dim=1).mean()) == pytest.approx(32**0.5, rel=1e-5)
    with pytest.raises(ConfigError, match="zero"):
        norm_scale([torch.zeros(3, 4)])


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is not None, reason="SAELens is installed")
def test_without_saelens_training_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs SAELens") as e:
        train(task(tmp_path))
    assert "sglang-probe[sae]" in str(e.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"architecture": "topk", "k": 2.5}, "whole number"),
        ({"samples": 10}, "less than one batch"),
        ({"samples": 2048, "lr_warm_up_steps": 2}, "longer than all 2 steps"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recipe(**{"lr_decay": 0.5, **keys})
