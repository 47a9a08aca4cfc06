"""Is an attribution true? The top nodes are ablated for real, beside matched random ones.

Attributions are estimates of first order or along one line; where softmaxes saturate, or where two nodes do the same
work, they may be far from what an ablation does (Kramár et al. 2403.00745). So each top node is ablated alone, and with
it random nodes of its layer and kind that are as large; then all top nodes together, beside sets in which each is
exchanged for one of itself and its random ones. The check passes if (`Verdict.failures` lists what does not hold)

* predicted and true effects of single nodes, top and random, have a Spearman correlation of at least `LEAST_RHO`, and
  one that exchanged predictions reach in at most 5 % of draws;
* the top nodes' effects are larger than those of their random ones (exchanged within each group, at most 5 %);
* the top nodes that raise the metric, together, do more than all but 5 % of the random sets (those that lower it would
  cancel them);
* the errors of the SAEs carry at most half of the attribution.

Each of the three tests holds its level where attributions say nothing, so the check does too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_probe.sae.attribution import Method, Node, Scored
from sglang_probe.stats.agreement import spearman

Array = np.ndarray[Any, Any]
LEAST_RHO = 0.5
LEVEL = 0.05
MOST_ERROR_SHARE = 0.5
LEAST_NODES = 10
"""With fewer single ablations a correlation says nothing."""
RANDOM_SETS = 39
"""Of joint ablations: the least p is 1/40."""
_DRAWS = 4999
_BLOCK = 500


@dataclass(frozen=True)
class Verdict:
    """What the ablations say."""

    rho: float
    """Spearman of predicted and true effects of single nodes."""
    rho_p: float
    larger_p: float
    """Of "the top nodes' effects are no larger than those of their matched random ones"."""
    joint_p: float
    """Of the same for those that raise the metric, together; NaN where none does."""
    error_share: float
    failures: tuple[str, ...]
    """What does not hold, in words."""

    @property
    def passed(self) -> bool:
        """Whether what was found may be called a circuit."""
        return not self.failures


def top_nodes(scored: Mapping[int, Scored], method: Method, count: int) -> list[Node]:
    """The nodes with the largest absolute attributions, the largest first."""
    nodes = [(abs(s.of(n, method)), n) for s in scored.values() for n in s.nodes()]
    return [n for _, n in sorted(nodes, key=lambda pair: (-pair[0], pair[1]))[:count]]


def matched(
    scored: Mapping[int, Scored], top: Sequence[Node], count: int, rng: np.random.Generator
) -> list[list[Node]]:
    """For each top node up to `count` random ones of its layer and kind, drawn from the `4 count` that are nearest in
    distance from their baseline; none is a top node, and none is drawn twice while there are others."""
    taken, used = set(top), set[Node]()
    out = []
    for node in top:
        site = scored[node.layer]
        pool = [n for n in site.nodes() if n.kind == node.kind and n not in taken]
        fresh = [n for n in pool if n not in used]
        pool = fresh if len(fresh) >= count else pool
        size = np.log(max(site.size(node), 1e-30))
        pool.sort(key=lambda n: (abs(np.log(max(site.size(n), 1e-30)) - size), n))
        near = pool[: 4 * count]
        drawn = [near[i] for i in rng.permutation(len(near))[:count]]
        used.update(drawn)
        out.append(drawn)
    return out


def random_sets(
    top: Sequence[Node], groups: Sequence[Sequence[Node]], rng: np.random.Generator, count: int = RANDOM_SETS
) -> list[list[Node]]:
    """Sets for joint ablations: each top node exchanged for one of itself and its random ones. The node itself is among
    them, because only then is a top set one of these sets where top nodes are nothing special."""
    pools = [[n, *g] for n, g in zip(top, groups, strict=True)]
    return [list(dict.fromkeys(p[int(rng.integers(len(p)))] for p in pools)) for _ in range(count)]


def judge(
    predicted_N: Array,
    true_N: Array,
    group_N: Array,
    top_N: Array,
    *,
    joint: float,
    joint_random: Array,
    error_share: float,
    seed: int = 0,
) -> Verdict:
    """Judge N single ablations, and the joint ones.

    Args:
        predicted_N, true_N: what the metric loses without a node.
        group_N: number of the top node that it is, or is matched to. top_N: bool.
        joint: what the metric loses without all top nodes that raise it. joint_random: without each random set.
    """
    rng = np.random.default_rng(seed)
    n = len(predicted_N)
    rho, rho_p = float("nan"), float("nan")
    if n >= LEAST_NODES:
        rho = float(spearman(predicted_N, true_N))
        orders = np.stack([rng.permutation(n) for _ in range(_DRAWS)])
        drawn = spearman(predicted_N[orders], np.broadcast_to(true_N, orders.shape))
        rho_p = _p(rho, drawn)
    larger_p = _larger(np.abs(true_N), group_N, top_N, rng)
    joint_p = _p(joint, joint_random) if len(joint_random) else float("nan")
    failures = []
    if not (rho >= LEAST_RHO and rho_p <= LEVEL):
        told = f"{rho:.2f} (p {rho_p:.3f})" if np.isfinite(rho) else f"unknown from {n} nodes"
        failures.append(f"predicted and true effects of single nodes have a rank correlation of {told}")
    if not larger_p <= LEVEL:
        failures.append(f"single top nodes do no more than matched random ones (p {larger_p:.3f})")
    if not joint_p <= LEVEL:
        failures.append(f"the top nodes that raise the metric do together no more than random sets (p {joint_p:.3f})")
    if not error_share <= MOST_ERROR_SHARE:
        failures.append(f"what the SAEs do not explain carries {100 * error_share:.0f} % of the attribution")
    return Verdict(rho, rho_p, larger_p, joint_p, error_share, tuple(failures))


def _p(observed: float, drawn: Array) -> float:
    """One-sided, the observed one among the draws (Phipson and Smyth 2010)."""
    if not np.isfinite(observed):
        return float("nan")
    return float((1 + (drawn >= observed - 1e-12).sum()) / (1 + len(drawn)))


def _larger(effect_N: Array, group_N: Array, top_N: Array, rng: np.random.Generator) -> float:
    """Mean rank of the top node within its group, against any of the group being the top one."""
    ranks, pools = [], []
    for g in np.unique(group_N):
        mine = group_N == g
        if mine.sum() < 2:
            continue
        effects = effect_N[mine]
        share = (effects[:, None] > effects[None]).mean(1) + (effects[:, None] == effects[None]).mean(1) / 2
        ranks.append(float(share[top_N[mine]][0]))
        pools.append(share)
    if not ranks:
        return float("nan")
    drawn = sum(pool[rng.integers(0, len(pool), _DRAWS)] for pool in pools) / len(pools)
    return _p(float(np.mean(ranks)), np.asarray(drawn))
