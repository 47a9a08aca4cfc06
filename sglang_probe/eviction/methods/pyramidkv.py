"""PyramidKV: SnapKV's scores with budgets that shrink from the first layer to the last."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.methods.snapkv import SnapKV
from sglang_probe.eviction.registry import register

FEWEST_LAYERS = 8
"""With fewer layers there is no line of budgets to speak of."""


@register("pyramidkv", source="arXiv 2406.02069")
class PyramidKV(SnapKV):
    """A line of budgets with mean b: the last layer gets (b - w) / beta besides the window, the first the mirror image.

    As in the authors' code, a first layer that would exceed the prompt is cut to it and the last is raised to match.
    Budgets are rounded cumulatively, so that their sum over the layers is exactly layers times b. kvpress draws the
    line over b instead of b - w, and keeps the budget uniform where the last layer would fall below the window.
    """

    beta: int = Field(default=20, ge=1)

    def caveat(self, layers: int) -> str | None:
        """The line of budgets was found on models of 32 layers: with few it starves one of them."""
        if layers >= FEWEST_LAYERS:
            return None
        return (
            f"PyramidKV's line of budgets was found on models of 32 layers; with {layers} the last gets about "
            f"1/{self.beta} of the mean, and what it scores here says nothing of the method."
        )

    def budgets(self, layer: Layer, budget: int) -> Tensor:
        """Budget of the layer at `Layer.index` among `Layer.num_layers`, the same for all its heads."""
        fixed = int(self.protected(layer, budget).sum())
        room = min(budget, layer.length) - fixed
        per_layer = torch.tensor(pyramid(room, layer.length - fixed, layer.num_layers, self.beta)) + fixed
        return per_layer[layer.index][..., None].expand(layer.shape_GL[:-1])


def pyramid(mean: int, most: int, layers: int, beta: int) -> list[int]:
    """Integers falling linearly over the layers with mean `mean`, the last about mean / beta, none above `most`."""
    if layers == 1 or mean <= 0:
        return [mean] * layers
    last = mean / beta
    if 2 * mean - last > most:
        last = 2 * mean - most
    step = 2 * (mean - last) / (layers - 1)
    done, out = 0, []
    for i in range(layers):
        # Sum of the exact line up to and including layer i, rounded; differences of rounded sums keep the total.
        upto = round((i + 1) * (2 * mean - last) - step * i * (i + 1) / 2)
        out.append(upto - done)
        done = upto
    return out
