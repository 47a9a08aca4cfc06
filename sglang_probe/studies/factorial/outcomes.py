"""What one cell of the factorial predicts of the real decoding, in one layer of one request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sglang_probe.eviction.layer import Layer, Queries
from sglang_probe.eviction.metrics import (
    candidate_budget,
    candidate_share,
    gold_scores,
    gold_set,
    hit_rate,
    nontrivial_mass_recall,
    output_error,
    trivial_mask,
)
from sglang_probe.eviction.scoring import lookahead_attention
from sglang_probe.eviction.select import ranks, top_k

COSINES = ("post", "pre", "pre_centred")
IMPORTANCE = ("spearman",)
AT_BUDGET = ("overlap", "mass", "output_error")
CHANCE = "chance"
"""Suffix of an outcome's column with what random candidates give."""


@dataclass(frozen=True)
class Reference:
    """The real decoding of one request in one layer."""

    layer: Layer
    """With the decode steps as `future`."""
    pre_THD: Tensor
    """Pre-RoPE queries of the decode steps."""
    mean_HD: Tensor
    """Mean pre-RoPE query of the prompt."""
    trivial_L: Tensor
    """Prompt positions that every set keeps and no measure counts."""


@dataclass(frozen=True)
class Pseudo:
    """Queries and keys of the pseudo tokens of one cell."""

    pre_NHD: Tensor
    post_NHD: Tensor
    k_NGD: Tensor


def cosines(reference: Reference, pseudo: Pseudo) -> dict[str, float]:
    """Cosine of pseudo query i to decode query i, mean over the N pairs and the heads."""
    assert reference.layer.future is not None
    n = pseudo.pre_NHD.shape[0]
    post, pre = reference.layer.future.q_THD[:n].float(), reference.pre_THD[:n].float()
    mean = reference.mean_HD
    pairs = {
        "post": (pseudo.post_NHD.float(), post),
        "pre": (pseudo.pre_NHD.float(), pre),
        "pre_centred": (pseudo.pre_NHD.float() - mean, pre - mean),
    }
    return {name: float(functional.cosine_similarity(a, b, dim=-1).mean()) for name, (a, b) in pairs.items()}


def pseudo_scores(reference: Reference, pseudo: Pseudo) -> Tensor:
    """Importance as DapQ has it: attention of the pseudo queries, the softmax over the pseudo tokens too, `[G, L]`."""
    queries = Queries(pseudo.post_NHD, pseudo.k_NGD)
    return lookahead_attention(reference.layer, queries, "visible").sum(-2).mean(-2)


def window_scores(reference: Reference, window: int) -> Tensor:
    """Importance by the attention of the last prompt queries, unpooled, `[G, L]`: SnapKV's."""
    return reference.layer.prompt_attention(window).sum(-2).mean(-2)


def true_scores(reference: Reference) -> Tensor:
    """What the real decoding reads, `[G, L]`: the best that a set for all steps can be chosen by."""
    return gold_scores(reference.layer.future_attention, reference.layer.length).squeeze(-3)


def agreement(reference: Reference, scores_GL: Tensor) -> dict[str, float]:
    """Spearman's correlation with the truth over the candidates, mean over kv heads; 0 by chance.

    The tail, which does not matter, has most of the weight in it.
    """
    free = ~reference.trivial_L
    a, b = (ranks(x[..., free]).double() for x in (scores_GL, true_scores(reference)))
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    return {"spearman": float(functional.cosine_similarity(a, b, dim=-1).mean())}


def at_budget(reference: Reference, scores_GL: Tensor, budget: int) -> dict[str, float]:
    """What keeping the best `budget` positions per kv head is worth, with the chance level of the first two."""
    trivial = reference.trivial_L
    a = reference.layer.future_attention
    keep = top_k(scores_GL, budget, trivial).unsqueeze(-3)
    gold = gold_set(true_scores(reference).unsqueeze(-3), trivial, candidate_budget(budget, trivial))
    chance = float(candidate_share(keep, trivial).mean())
    return {
        "overlap": float(hit_rate(keep, gold).mean()),
        "mass": float(nontrivial_mass_recall(a, keep, trivial).pooled()),
        "output_error": _error(reference.layer, keep),
        f"overlap_{CHANCE}": chance,
        f"mass_{CHANCE}": chance,
    }


def random_output_error(reference: Reference, budget: int, *, draws: int = 4, seed: int = 0) -> float:
    """Mean output error of random candidates; it has no closed form."""
    generator = torch.Generator().manual_seed(seed)
    shape = reference.layer.shape_GL
    keeps = (top_k(torch.rand(shape, generator=generator), budget, reference.trivial_L) for _ in range(draws))
    return sum(_error(reference.layer, keep.unsqueeze(-3)) for keep in keeps) / draws


def trivial_of(length: int, *, sinks: int, window: int) -> Tensor:
    """`Reference.trivial_L`."""
    return trivial_mask(length, sinks=sinks, window=window)


def _error(layer: Layer, keep_TGL: Tensor) -> float:
    """‖W_O (õ - o)‖ / ‖W_O o‖, mean over decode steps; by head where the projection is not at hand."""
    error = output_error(layer, keep_TGL)
    return float((error.relative_GRT if error.projected_T is None else error.projected_T).mean())
