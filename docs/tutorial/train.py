"""A sparse autoencoder on the captured rows, trained by SAELens (`pip install sae-lens`)."""

import itertools

from sae_lens import LoggingConfig, SAETrainer, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

import sglang_probe

run = sglang_probe.load_run("runs/live/segment-00000")
weights = "runs/live/segment-00000/coverage/weights-role.parquet"


def rows():
    """SAELens' DataProvider: batches [1024, 256], epoch after epoch, each role as often as in the traffic."""
    for epoch in itertools.count():
        for x in run.iter_batches("blocks.2.hook_resid_post", batch_size=1024, weight=weights, seed=epoch):
            yield x.float()


config = SAETrainerConfig(
    total_training_samples=200_000,
    train_batch_size_samples=1024,
    lr=1e-3,
    lr_end=1e-4,
    logger=LoggingConfig(log_to_wandb=False),
)
sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=256, d_sae=1024, l1_coefficient=1.0))
trained = SAETrainer(config, sae, rows()).fit()

x = next(rows())
left = (x - trained(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
print(f"variance explained: {1 - left.item():.3f}")
