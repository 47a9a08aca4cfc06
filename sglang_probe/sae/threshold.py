"""The threshold of a BatchTopK SAE, measured where its training only tracked it.

SAELens keeps the threshold as a running mean with a rate of 0.01 that starts at 0. After few steps it is far too low:
on SmolLM2, block 10, an SAE saved after 75 steps had 381 active latents where its `k` said 32, and an explained
variance of -9.9 where 0.39 was there. Counted on rows that were held out it is right after any number of steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sglang_probe.errors import ConfigError
from sglang_probe.sae.sae import SAE

if TYPE_CHECKING:
    import torch

_BLOCK = 1024


def shared_threshold(sae: SAE) -> float:
    """The one threshold of all latents.

    Raises:
        ConfigError: the SAE has none, or one for each latent: those are learnt and not to be replaced.
    """
    if sae.threshold is None:
        raise ConfigError(f"an SAE of architecture `{sae.architecture}` has no threshold")
    if not bool((sae.threshold == sae.threshold[0]).all()):
        raise ConfigError("the latents of this SAE have thresholds of their own, which its training learnt")
    return float(sae.threshold[0])


def threshold_for(sae: SAE, x_ND: torch.Tensor, l0: float) -> float:
    """The threshold under which rows have `l0` active latents on average: what is above it is exactly the
    `round(N * l0)` largest pre-activations of all rows together, as BatchTopK chooses them in training.

    Args:
        x_ND: rows, not those of the training; a few thousand are enough.

    Returns:
        At least 0: where fewer pre-activations are positive, all of these are active.

    Raises:
        ConfigError: there are no rows, or `l0` is not between 0 and the number of latents.
    """
    import torch

    if not len(x_ND) or not 0 < l0 < sae.latents:
        raise ConfigError(f"a threshold for {l0} of {sae.latents} latents cannot be found on {len(x_ND)} rows")
    wanted = round(len(x_ND) * l0) + 1
    largest = x_ND.new_empty(0, dtype=sae.W_enc.dtype)
    for start in range(0, len(x_ND), _BLOCK):
        block = x_ND[start : start + _BLOCK]
        candidates = torch.cat([largest, sae.pre_activations(block).flatten()])
        largest = candidates.topk(min(wanted, len(candidates))).values
    # A latent fires strictly above the threshold, so the largest value that is not to fire is the threshold.
    return max(float(largest[-1]), 0.0)


def recalibrated(sae: SAE, x_ND: torch.Tensor, l0: float) -> SAE:
    """The SAE with its shared threshold replaced by `threshold_for` these rows.

    Raises:
        ConfigError: as `shared_threshold` and `threshold_for`.
    """
    import torch

    shared_threshold(sae)
    assert sae.threshold is not None
    return replace(sae, threshold=torch.full_like(sae.threshold, threshold_for(sae, x_ND, l0)))
