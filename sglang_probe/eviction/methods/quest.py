"""Quest: choose pages anew for each decode query by an upper bound on their logits."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from sglang_probe.eviction.base import Method, Selection
from sglang_probe.eviction.layer import Layer, Queries
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.scoring import GroupReduction, reduce_group
from sglang_probe.eviction.select import top_k


@register("quest", source="arXiv 2406.10774")
class Quest(Method):
    """Page score of a decode query: the sum over dimensions of max(q·min, q·max) of the page's keys.

    A selection: nothing leaves memory. Whole pages are chosen, so a budget means `budget // page` of them and at least
    `min_pages`; the last page may be shorter. The first `dense_layers` layers read everything, as published.
    """

    page: int = Field(default=16, ge=1)
    min_pages: int = Field(default=3, ge=1)
    dense_layers: int = Field(default=2, ge=0)
    gqa: GroupReduction = "max"

    def scores(self, layer: Layer) -> Tensor:
        """Bound of the page that holds each position, for every scored decode step, `[..., T, G, L]`."""
        bound = self._page_bounds(layer)
        return bound.repeat_interleave(self.page, -1)[..., : layer.length]

    def select(self, layer: Layer, budget: int) -> Selection:
        """Pages per decode step; dense layers, and a budget of the whole prompt, read all."""
        bound = self._page_bounds(layer)
        pages = bound.shape[-1] if budget >= layer.length else max(self.min_pages, budget // self.page)
        always = self.protected(layer, budget)
        always = torch.unflatten(functional.pad(always, (0, -layer.length % self.page)), -1, (-1, self.page)).any(-1)
        keep = top_k(bound, pages, always).repeat_interleave(self.page, -1)[..., : layer.length]
        dense = (layer.index < self.dense_layers).reshape(*layer.index.shape, 1, 1, 1)
        scores = bound.repeat_interleave(self.page, -1)[..., : layer.length]
        return Selection(keep | dense.to(keep.device), scores, evicts=False)

    def _page_bounds(self, layer: Layer) -> Tensor:
        future: Queries = layer.require("future")
        dtype = torch.promote_types(layer.k_LGD.dtype, torch.float32)
        k_GLD = layer.k_LGD.to(dtype).movedim(-3, -2)
        # Padding repeats the last key, which changes neither the minimum nor the maximum of its page.
        short = -layer.length % self.page
        k_GLD = torch.cat([k_GLD, k_GLD[..., -1:, :].expand(*k_GLD.shape[:-2], short, k_GLD.shape[-1])], -2)
        k_GPSD = torch.unflatten(k_GLD, -2, (-1, self.page))
        low, high = k_GPSD.amin(-2).mT, k_GPSD.amax(-2).mT
        q = torch.unflatten(future.q_THD[..., future.skip :, :, :].to(dtype), -2, (layer.kv_heads, layer.group))
        q_GXD = q.movedim(-4, -2).flatten(-3, -2)
        bound = q_GXD.clamp(min=0) @ high + q_GXD.clamp(max=0) @ low
        bound_GRTP = torch.unflatten(bound, -2, (layer.group, -1))
        return reduce_group(bound_GRTP.movedim(-2, -4), self.gqa)
