"""Training by SAELens, in our own loop: progress, evaluation on held-out rows, checkpoints that resume exactly.

SAELens (the extra `[sae]`) is imported inside functions of this file and nowhere else: its import takes ten seconds.
Its traps, and where they are dealt with here:

* rows are scaled by a factor that is folded into the weights at the end of its `fit` only: `exported` folds, always;
* its estimate of the factor consumes a thousand batches: `norm_scale` looks at rows without consuming them;
* nothing seeds the initialisation, and its shuffling uses the global generator: batches come from `Schedule`;
* the threshold of BatchTopK is a slow running mean: `recalibrated` on held-out rows, and both are kept;
* decoders are folded to unit norm, those of `standard` too, which SAELens leaves as they are.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.run import journal
from sglang_probe.sae.evaluation import evaluate
from sglang_probe.sae.recipe import Recipe
from sglang_probe.sae.sae import SAE
from sglang_probe.sae.threshold import recalibrated

if TYPE_CHECKING:
    import torch

CHECKPOINT = "checkpoint"
_CURVE, _TELL_EVERY = "curve.json", 5
NEEDS = "needs SAELens"
FIX = "pip install 'sglang-probe[sae]'; constraints/0.5.23.txt has versions that leave SGLang's alone"


@dataclass(frozen=True)
class Task:
    """One dictionary to train."""

    recipe: Recipe
    latents: int
    seed: int
    """Of the initialisation."""
    batch: Callable[[int], torch.Tensor] | None
    """Rows of a step, float32 `[batch_size, D]`; the same whenever it is asked. None: `Course.learn` is given them."""
    scale: float
    """`norm_scale` of the rows."""
    held_out: torch.Tensor
    """Rows that are never trained on, for the learning curve `[n, D]`."""
    folder: Path
    """Gets the checkpoint."""
    checkpoint_every: int = 200
    """Steps."""
    curve_points: int = 12


@dataclass(frozen=True)
class Trained:
    """A dictionary in the space of rows as they are, decoder rows of norm 1."""

    sae: SAE
    """BatchTopK with the threshold that its training left."""
    curve: pd.DataFrame
    """By `step` and `samples`: `loss`, `l0`, `dead_share` (latents that did not fire in `dead_after_steps`),
    `explained_variance` of the last batch; and on held-out rows `held_out` (explained variance), `held_out_l0`, and of
    BatchTopK `recalibrated` (explained variance with the threshold that gives `k` active latents)."""
    seconds: float
    """Of training, evaluation for the curve included; of the last process alone, if it was resumed."""


def require_sae_lens(what: str = "training") -> str:
    """Version of SAELens.

    Args:
        what: needs it, for the message.

    Raises:
        ConfigError: it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sae-lens")
    except PackageNotFoundError as e:
        raise ConfigError(f"{what} {NEEDS}", fix=FIX) from e


NORM_ROWS = 20_000
"""Rows, at most, that a scale is taken from."""


def norm_scale(batches: Iterable[torch.Tensor]) -> float:
    """The factor that gives rows a mean norm of `sqrt(D)`, as SAELens' `expected_average_only_in` does; the same
    however the rows are cut into batches.

    Raises:
        ConfigError: all rows are zero.
    """
    import torch

    norms, width = [], 0
    for rows in batches:
        norms.append(rows.norm(dim=1).double())
        width = rows.shape[1]
    every = torch.cat(norms)
    if not bool(every.any()):
        raise ConfigError("all rows are zero: nothing can be learnt from them")
    return float(width**0.5 * len(every) / every.sum())


def train(task: Task, tell: Callable[[dict[str, float]], None] = lambda _: None) -> Trained:
    """Train one dictionary, from its checkpoint if there is one.

    Args:
        tell: gets `step`, `loss`, `l0`, `dead_share` and `explained_variance` of the current batch.

    Raises:
        ConfigError: SAELens is not installed, or a loss is not finite.
    """
    assert task.batch is not None
    course = Course(task, tell, task.folder / CHECKPOINT)
    while not course.ended:
        course.learn(task.batch(course.step))
        if course.step % task.checkpoint_every == 0 and not course.ended:
            with replaced(task.folder / CHECKPOINT) as made:
                course.write(made)
    return course.trained()


class Course:
    """A training that is given the rows of each step.

    Args:
        tell: as of `train`.
        start: a folder that `write` wrote; if it is there, the training goes on from it.

    Raises:
        ConfigError: SAELens is not installed.
    """

    def __init__(
        self, task: Task, tell: Callable[[dict[str, float]], None] = lambda _: None, start: Path | None = None
    ) -> None:
        require_sae_lens()
        os.environ.setdefault("WANDB_MODE", "disabled")
        self._task, self._tell, self._trainer = task, tell, _trainer(task)
        self._curve = [] if start is None else _restore(self._trainer, start)
        points, steps = task.curve_points, task.recipe.steps
        self._marks = {max(1, round(steps * (i + 1) / points)) for i in range(points)}
        self._start = time.monotonic()

    @property
    def step(self) -> int:
        """Steps that were made."""
        return int(self._trainer.n_training_steps)

    @property
    def ended(self) -> bool:
        """Whether all were."""
        return self.step >= self._task.recipe.steps

    def learn(self, rows_BD: torch.Tensor) -> None:
        """Make a step.

        Raises:
            ConfigError: the loss is not finite.
        """
        output = self._trainer.step(rows_BD)
        self._trainer.n_training_steps = done = self.step + 1  # `step` of SAELens leaves it
        if done not in self._marks and done % _TELL_EVERY:
            return
        now = _now(self._trainer, output)
        if now["loss"] != now["loss"] or abs(now["loss"]) == float("inf"):
            raise ConfigError(f"the loss is {now['loss']} at step {done}", fix="lower `lr`")
        self._tell({"step": done, **now})
        if done in self._marks:
            judged = _judge(self._exported(), self._task)
            self._curve.append({"step": done, "samples": done * self._task.recipe.batch_size, **now, **judged})

    def write(self, folder: Path) -> None:
        """All that is needed to go on."""
        self._trainer.sae.save_model(folder)
        self._trainer.save_trainer_state(folder)
        journal.write_text_durably(folder / _CURVE, json.dumps(self._curve) + "\n")

    def trained(self) -> Trained:
        """The dictionary."""
        return Trained(self._exported(), pd.DataFrame(self._curve), time.monotonic() - self._start)

    def _exported(self) -> SAE:
        return exported(self._trainer.sae, self._task.recipe, self._task.scale)


def exported(training_sae: Any, recipe: Recipe, scale: float) -> SAE:
    """A copy of the weights that SAELens trains, for rows as they are, with decoder rows of norm 1."""
    import torch

    state = {name: t.detach().clone().float() for name, t in training_sae.state_dict().items()}
    architecture: Any = "jumprelu" if recipe.batch_topk else recipe.architecture
    threshold = state.get("threshold")
    if recipe.batch_topk:
        # In units of pre-activations of decoder rows of norm 1, as SAELens chooses with `rescale_acts_by_decoder_norm`.
        threshold = state["topk_threshold"] / training_sae.W_dec.detach().norm(dim=-1).clamp(min=1e-8)
    elif threshold is not None:
        threshold = threshold.clamp(min=0)  # it is clamped at the start of every step, not after the last
    sae = SAE(
        architecture,
        state["W_enc"],
        state["W_dec"],
        state["b_enc"],
        state["b_dec"],
        threshold=threshold,
        k=int(recipe.k) if recipe.architecture == "topk" else None,
        apply_b_dec_to_input=training_sae.cfg.apply_b_dec_to_input,
        rescale_by_decoder_norm=recipe.architecture == "topk",
    )
    sae = sae.scaled(scale).unit_norm()
    if recipe.batch_topk and sae.threshold is not None:
        # One number, which rounding has made M that differ in the last bit.
        sae = replace(sae, threshold=torch.full_like(sae.threshold, float(sae.threshold.mean())))
    return sae


def _trainer(task: Task) -> Any:
    import torch
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        LoggingConfig,
        SAETrainer,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig

    r, width = task.recipe, task.held_out.shape[1]
    warm_up = round(r.sparsity_warm_up * r.steps)
    common: dict[str, Any] = {"d_in": width, "d_sae": task.latents, "device": "cpu"}
    aux = {"aux_loss_coefficient": 1.0 if r.revive else 0.0}
    torch.manual_seed(task.seed)  # nothing else seeds the initialisation
    sae: Any
    if r.architecture == "batchtopk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common, k=r.k, **aux))
    elif r.architecture == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=int(r.k), **aux))
    elif r.architecture == "standard":
        sae = StandardTrainingSAE(
            StandardTrainingSAEConfig(**common, l1_coefficient=r.sparsity or 4.0, l1_warm_up_steps=warm_up)
        )
    else:
        revival = {"pre_act_loss_coefficient": 3e-6 if r.revive else None}
        sae = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(**common, l0_coefficient=r.sparsity or 1.0, l0_warm_up_steps=warm_up, **revival)
        )
    config = SAETrainerConfig(
        total_training_samples=r.steps * r.batch_size,
        train_batch_size_samples=r.batch_size,
        lr=r.lr,
        lr_end=r.lr / 10,  # None, the default, fails an assertion; with a constant rate it is not used
        lr_warm_up_steps=r.lr_warm_up_steps,
        lr_decay_steps=round(r.lr_decay * r.steps),
        device="cpu",
        dead_feature_window=r.dead_after_steps,
        feature_sampling_window=10**9,  # else it makes a histogram of wandb's
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer: Any = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))
    trainer.activation_scaler.scaling_factor = task.scale
    return trainer


def _now(trainer: Any, output: Any) -> dict[str, float]:
    import torch

    with torch.no_grad():
        error = (output.sae_out - output.sae_in).square().sum(-1).mean()
        variance = (output.sae_in - output.sae_in.mean(0)).square().sum(-1).mean()
        return {
            "loss": float(output.loss.detach()),
            "l0": float((output.feature_acts > 0).sum(-1).float().mean()),
            "dead_share": float(trainer.dead_neurons.float().mean()),
            "explained_variance": float(1 - error / variance),
        }


def _judge(sae: SAE, task: Task) -> dict[str, float]:
    found = evaluate(sae, task.held_out)
    judged = {"held_out": found.explained_variance, "held_out_l0": found.l0}
    if task.recipe.batch_topk:
        again = evaluate(recalibrated(sae, task.held_out, task.recipe.k), task.held_out)
        judged["recalibrated"] = again.explained_variance
    return judged


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end; whatever moment the process ends at, `is_there` finds
    the one or the other, whole."""
    made = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    yield made
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    journal.sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_there(folder: Path) -> bool:
    """Whether there is a folder that `replaced` made."""
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and old.exists():  # ended between the two renames
        old.rename(folder)
    return folder.exists()


def _restore(trainer: Any, folder: Path) -> list[dict[str, float]]:
    """Load the checkpoint into the trainer, if there is one; returns the curve so far."""
    if not is_there(folder):
        return []
    trainer.sae.load_weights_from_checkpoint(folder)
    trainer.load_trainer_state(folder)
    curve: list[dict[str, float]] = json.loads((folder / _CURVE).read_text(encoding="utf-8"))
    return curve
