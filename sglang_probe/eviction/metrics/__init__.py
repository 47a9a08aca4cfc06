"""What an eviction costs, measured on captured attention. Every number has its chance level beside it.

Trivial positions F (sinks and the last window) and candidates C are those of `trivial_mask`; use the same F for all
methods.
"""

from __future__ import annotations

from sglang_probe.eviction.metrics.budget import Cost, cost
from sglang_probe.eviction.metrics.dispersion import (
    Spread,
    gini,
    global_eviction_chance,
    global_eviction_ratio,
    share_below,
    spread,
)
from sglang_probe.eviction.metrics.mass import (
    nontrivial_mass_chance,
    nontrivial_mass_recall,
    prompt_mass_recall,
    protected_random_mass,
    total_mass_recall,
)
from sglang_probe.eviction.metrics.output import OutputError, output_error
from sglang_probe.eviction.metrics.overlap import gold_scores, gold_set, hit_chance, hit_rate, jaccard
from sglang_probe.eviction.metrics.rank import kendall_top, ndcg, ndcg_chance, rbo, rbo_chance
from sglang_probe.eviction.metrics.ratio import Ratio
from sglang_probe.eviction.metrics.regret import gap_closed, regret
from sglang_probe.eviction.metrics.trivial import candidate_budget, candidate_share, trivial_mask
from sglang_probe.stats.distance import jensen_shannon, kl, total_variation

__all__ = [
    "Cost",
    "OutputError",
    "Ratio",
    "Spread",
    "candidate_budget",
    "candidate_share",
    "cost",
    "gap_closed",
    "gini",
    "global_eviction_chance",
    "global_eviction_ratio",
    "gold_scores",
    "gold_set",
    "hit_chance",
    "hit_rate",
    "jaccard",
    "jensen_shannon",
    "kendall_top",
    "kl",
    "ndcg",
    "ndcg_chance",
    "nontrivial_mass_chance",
    "nontrivial_mass_recall",
    "output_error",
    "prompt_mass_recall",
    "protected_random_mass",
    "rbo",
    "rbo_chance",
    "regret",
    "share_below",
    "spread",
    "total_mass_recall",
    "total_variation",
    "trivial_mask",
]
