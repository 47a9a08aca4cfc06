"""All offline metrics of one selection over a batch, per request and per head.

Within a request, mass is pooled over layers, heads and steps as a ratio of sums; everything else is a mean over them.
Every overlap has its exact chance level beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.eviction import metrics
from sglang_probe.eviction.base import Policy, Selection
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.lookahead import LookaheadScorer
from sglang_probe.eviction.methods.h2o import H2O
from sglang_probe.eviction.methods.observed_attention import ObservedAttention
from sglang_probe.eviction.methods.snapkv import SnapKV
from sglang_probe.eviction.methods.tova import TOVA
from sglang_probe.eviction.oracles.static_mean import StaticMean
from sglang_probe.studies.evict.grid import Trivial

Array = np.ndarray[Any, Any]

HORIZON = 8
"""Decode steps of the horizon-limited hit rate."""
RBO_P = 0.9

METRICS: dict[str, str] = {
    "mass": "attention mass on kept and generated positions, of all mass",
    "prompt_mass": "attention mass on kept prompt positions, of the mass on the prompt",
    "nontrivial": "attention mass on kept candidates, of the mass on candidates (no sinks, no last window)",
    "hit": "share of the positions that decoding reads most, in sum, that are kept",
    "hit_max": "the same for positions that some step and head reads most",
    "hit_early": f"the same for the first {HORIZON} steps",
    "ndcg": "NDCG of what is kept, in the policy's order, gain = mass on the whole prompt",
    "rbo": f"rank-biased overlap of what is kept with the ranking by mass, p = {RBO_P}",
    "js": "Jensen-Shannon distance of the scores to the mass, of methods whose scores are attention; 0 is best",
    "output_error": "relative error of a layer's attention output after W_O, full-cache inputs; 0 is best",
    "head_error": "the same per query head, before W_O",
    "evicted": "evicted mass p of the decomposition of the output error",
    "gap": "distance between kept and evicted values over the output norm: head error = p times gap",
    "gini": "Gini coefficient of non-trivial recall over layers and heads",
    "below_random": "share of heads with less non-trivial mass than protected random is expected to hold",
    "needed_kept": "share of needed candidates that are kept, mean over layers and heads",
    "lost_everywhere": "share of needed positions that no head of any layer keeps",
}
"""What each metric says, for reports. Those that have a chance level have it as `<name>_chance`."""

SHORT: dict[str, str] = {
    "mass": "attention mass",
    "prompt_mass": "mass on the prompt",
    "nontrivial": "non-trivial mass",
    "hit": "hit rate",
    "hit_max": "hit rate, peaks",
    "hit_early": "hit rate, early steps",
    "ndcg": "NDCG",
    "rbo": "rank-biased overlap",
    "js": "Jensen-Shannon distance",
    "output_error": "output error",
    "head_error": "output error by head",
    "evicted": "evicted mass",
    "gap": "gap of evicted values",
    "gini": "Gini over heads",
    "below_random": "heads below random",
    "needed_kept": "needed positions kept",
    "lost_everywhere": "lost by all heads",
}
"""Headers of tables."""

BETTER_LOW = ("js", "output_error", "head_error", "evicted", "gap", "gini", "below_random", "lost_everywhere")

_BY_ATTENTION = (SnapKV, H2O, ObservedAttention, TOVA, LookaheadScorer, StaticMean)


@dataclass(frozen=True)
class Judgement:
    """One policy under one budget, over the requests of a batch."""

    by_request: dict[str, Array]
    """Metric or chance level to values `[B]`; NaN where it has no meaning for the policy."""
    held_BYH: Array
    """Non-trivial mass that is kept, summed over steps, by layer and query head."""
    nontrivial_BYH: Array
    """Non-trivial mass in all."""


class Judge:
    """Judges selections on one batch. What does not depend on the selection is computed once.

    Args:
        layer: leading axes are requests and layers, under the protocol of the selections.
        trivial: the same for all policies.
        itemsize: bytes per element of keys and values in the cache.
        copies: query heads that each store what one kv head does (`Layer.per_query_head`).
    """

    def __init__(self, layer: Layer, trivial: Trivial, itemsize: int, copies: int = 1) -> None:
        self.layer = layer
        self._trivial, self._copies = trivial, copies
        self.trivial_L = metrics.trivial_mask(layer.length, sinks=trivial.sinks, window=trivial.window)
        self._itemsize = itemsize
        self._gold_sets: dict[tuple[str, int], Tensor] = {}

    @cached_property
    def wide(self) -> Judge:
        """The judge of kept sets by query head."""
        return Judge(self.layer.per_query_head(), self._trivial, self._itemsize, self.layer.group)

    @cached_property
    def _gold(self) -> dict[str, Tensor]:
        a, length = self.layer.future_attention, self.layer.length
        return {
            "hit": metrics.gold_scores(a, length),
            "hit_max": metrics.gold_scores(a, length, how="max"),
            "hit_early": metrics.gold_scores(a, length, horizon=HORIZON),
        }

    def _gold_set(self, name: str, candidates: int) -> Tensor:
        key = (name, candidates)
        if key not in self._gold_sets:
            self._gold_sets[key] = metrics.gold_set(self._gold[name], self.trivial_L, candidates)
        return self._gold_sets[key]

    def __call__(self, policy: Policy, selection: Selection, budget: int) -> Judgement:
        """All metrics of what `policy` selected under `budget`.

        Raises:
            ProbeError: the budget leaves no candidate, or a decode step no attention mass.
        """
        layer, keep, free = self.layer, selection.keep_TGL, ~self.trivial_L
        a = layer.future_attention
        candidates = metrics.candidate_budget(budget, self.trivial_L)
        total = metrics.total_mass_recall(a, keep)
        prompt = metrics.prompt_mass_recall(a, keep)
        nontrivial = metrics.nontrivial_mass_recall(a, keep, self.trivial_L)
        chance = metrics.nontrivial_mass_chance(a, keep, self.trivial_L)
        random = candidates / int(free.sum())
        out = {
            "mass": _pooled(total),
            "prompt_mass": _pooled(prompt),
            "prompt_mass_chance": _pooled(metrics.protected_random_mass(a, self.trivial_L, candidates)),
            "nontrivial": _pooled(nontrivial),
            "nontrivial_chance": _pooled(chance),
            "nontrivial_share": nontrivial.denominator.flatten(1).mean(1),
        }
        hit_chance = metrics.hit_chance(keep, self.trivial_L).flatten(1).mean(1)
        for name in self._gold:
            hit = metrics.hit_rate(keep, self._gold_set(name, candidates))
            out[name] = hit.flatten(1).mean(1)
            out[f"{name}_chance"] = hit_chance
        out |= self._rankings(policy, selection, budget, free)
        error = metrics.output_error(layer, keep)
        assert error.projected_T is not None
        out |= {
            "output_error": error.projected_T.flatten(1).mean(1),
            "head_error": error.relative_GRT.flatten(1).nanmean(1),
            "evicted": error.evicted_GRT.flatten(1).mean(1),
            "gap": error.gap_GRT.flatten(1).nanmean(1),
        }
        held_BYH = nontrivial.numerator.sum(-1).flatten(2)
        mass_BYH = nontrivial.denominator.sum(-1).flatten(2)
        recall_BYH = held_BYH / mass_BYH
        out["gini"] = torch.tensor([metrics.gini(r[~r.isnan()]) for r in recall_BYH.flatten(1)])
        out["below_random"] = (recall_BYH < random).flatten(1).float().mean(1)
        out |= self._lost(selection)
        out |= self._cost(policy, selection)
        return Judgement(
            {k: v.to(torch.float64).numpy() for k, v in out.items()},
            held_BYH.to(torch.float64).numpy(),
            mass_BYH.to(torch.float64).numpy(),
        )

    def _rankings(self, policy: Policy, selection: Selection, budget: int, free: Tensor) -> dict[str, Tensor]:
        """What is kept, as a ranking of the whole prompt, where one ranking holds for all steps."""
        size = len(selection.keep_TGL)
        if selection.scores_TGL.shape[-3] != 1:
            return dict.fromkeys(("ndcg", "ndcg_chance", "rbo", "rbo_chance", "js"), torch.full((size,), torch.nan))
        scores, keep = selection.scores_GL.to(torch.float64), selection.keep_TGL.squeeze(-3)
        gold = self._gold["hit"].squeeze(-3).to(torch.float64)
        js = torch.full((size,), torch.nan)
        if isinstance(policy, _BY_ATTENTION):
            js = metrics.jensen_shannon(scores[..., free], gold[..., free]).sqrt().flatten(1).nanmean(1)
        length = gold.shape[-1]
        return {
            "ndcg": metrics.ndcg(scores, gold, budget, kept=keep).flatten(1).nanmean(1),
            "ndcg_chance": metrics.ndcg_chance(gold, budget, kept=keep).flatten(1).nanmean(1),
            "rbo": metrics.rbo(scores, gold, p=RBO_P, kept=keep).flatten(1).mean(1),
            "rbo_chance": metrics.rbo_chance(length, p=RBO_P, kept=keep).flatten(1).mean(1),
            "js": js,
        }

    def _lost(self, selection: Selection) -> dict[str, Tensor]:
        """Needed positions that are kept, and those that are gone from all heads, with what is expected of random
        candidates. Positions that every policy is given (sinks, window) say nothing of what is kept."""
        keep, needed = selection.keep_TGL, self.layer.needed_L
        size = len(keep)
        names = ("needed_kept", "needed_kept_chance", "lost_everywhere", "lost_everywhere_chance")
        if needed is None or not selection.evicts:
            return dict.fromkeys(names, torch.full((size,), torch.nan))
        free = ~self.trivial_L
        kept_BL = selection.keep_GL.flatten(1, -2).to(torch.float64).mean(1)
        wanted_BL = needed[:, 0] & free
        # 0 / 0, where nothing is needed but sinks and window, is NaN.
        kept = (kept_BL * wanted_BL).sum(-1) / wanted_BL.sum(-1)
        kept_chance = torch.where(wanted_BL.any(-1), kept_BL[:, free].mean(-1), torch.nan)
        lost, chance = [], []
        for keep_YGL, needed_L in zip(selection.keep_GL, needed[:, 0], strict=True):
            if not bool(needed_L.any()):
                lost.append(torch.nan)
                chance.append(torch.nan)
                continue
            lost.append(metrics.global_eviction_ratio(keep_YGL, needed_L))
            chance.append(metrics.global_eviction_chance(keep_YGL, needed_L, self.trivial_L))
        return dict(zip(names, (kept, kept_chance, torch.tensor(lost), torch.tensor(chance)), strict=True))

    def _cost(self, policy: Policy, selection: Selection) -> dict[str, Tensor]:
        """Bytes of a request's prompt over the captured layers. Requests of a batch cost the same."""
        size = len(selection.keep_TGL)
        extra = policy.steps if isinstance(policy, LookaheadScorer) else 0
        cost = metrics.cost(
            selection,
            head_dim=self.layer.k_LGD.shape[-1],
            itemsize=self._itemsize,
            group=self._copies,
            extra_tokens=extra,
        ).as_dict()
        totals = {k: cost[k] / size for k in ("bytes", "bytes_full", "bytes_peak")}
        each = {k: cost[k] for k in ("tokens_per_head", "share", "bytes_share")}
        return {k: torch.full((size,), float(v), dtype=torch.float64) for k, v in {**totals, **each}.items()}


def check_counts(policy: Policy, selection: Selection, budget: int) -> int:
    """Assert that an eviction keeps, over the heads of each request, exactly what its budgets say.

    Returns:
        Requests asserted.

    Raises:
        ProbeError: names the policy and the counts.
    """
    if not selection.evicts:
        return 0
    keep = selection.keep_GL
    wanted = min(budget, keep.shape[-1]) * keep[0, ..., 0].numel()
    found = keep.flatten(1).sum(1)
    if bool((found != wanted).any()):
        raise ProbeError(
            f"{policy.name} keeps {int(found.min())} to {int(found.max())} entries of a request and not {wanted}",
            fix="report this; no number of this study can be trusted",
        )
    return len(keep)


def _pooled(ratio: metrics.Ratio) -> Tensor:
    numerator, denominator = (x.flatten(1).to(torch.float64).sum(1) for x in (ratio.numerator, ratio.denominator))
    return numerator / denominator
