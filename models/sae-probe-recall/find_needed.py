"""Does tracing find the positions that an answer of probe-recall needs? They are known (models/probe-recall/need.json).

    python models/sae-probe-recall/find_needed.py models/sae-probe-recall/seed-0 > models/sae-probe-recall/needed.json

For each of some puzzles that the SAE was not trained on: the metric is the logit of the right answer minus that of the
likeliest other token. Positions are ranked by the sum of their nodes' attributions, the context alone; the null is as
many positions drawn at random among those whose rows are about as far from the baseline.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_probe.paths import shipped
from sglang_probe.sae.attribution import GRADIENT, INTEGRATED, Method, Node, Prompt, Scored, Site
from sglang_probe.sae.attribution_check import judge, matched, random_sets, top_nodes
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.sae.sae import SAE
from sglang_probe.studies.trace.setup import load_model
from sglang_probe.workload.request import Truth
from sglang_probe.workload.retrieval import Retrieval
from sglang_probe.workload.sources import SourceReport

LAYER, SEED, QUESTION = 0, 400, 2
STEPS = 20


def puzzles(count: int, seed: int = SEED) -> list[Truth]:
    """Puzzles with one answer each, of the shape that the SAE was trained on and of other seeds."""
    source = Retrieval(task="recall", count=count, prompt_tokens=164, answers=1, distractors=16, seed=seed)
    return [c.truth for c in source.conversations(SourceReport()) if c.truth is not None]


def prompt_of(model: Any, sae: SAE, truth: Truth) -> Prompt:
    """The right answer against the likeliest other one; `<bos>` has no nodes.

    Raises:
        AssertionError: the model does not answer rightly.
    """
    ids = list(truth.prompt_ids)
    traced = torch.ones(len(ids), dtype=torch.bool)
    traced[0] = False
    site = Site.of(LAYER, sae)
    size = int(model.config.vocab_size)
    logits = Prompt(model, ids, torch.zeros(size), [site], {LAYER: traced}).logits_V.clone()
    answer = truth.answer_ids[0]
    assert int(logits.argmax()) == answer
    logits[answer] = -torch.inf
    weights = torch.zeros(size)
    weights[answer], weights[int(logits.argmax())] = 1.0, -1.0
    return Prompt(model, ids, weights, [site], {LAYER: traced})


def ranks(scored: Scored, method: Method, needed: Sequence[int]) -> list[int]:
    """Rank, from 1, of each needed position by the attribution of all its nodes, among those of the context."""
    by_position = (scored.features(method).sum(-1) + scored.errors(method)).abs()
    order = torch.argsort(-by_position[: len(by_position) - QUESTION]).tolist()
    return sorted(order.index(p) + 1 for p in needed)


def nodes_at(scored: Scored, positions: Sequence[int]) -> list[Node]:
    """Every node of some positions."""
    at = set(positions)
    return [n for n in scored.nodes() if n.position in at]


def alike(scored: Scored, needed: Sequence[int], rng: np.random.Generator) -> list[int]:
    """For each needed position another of the context whose row is about as far from the baseline."""
    away = torch.where(scored.traced_T, scored.error_TD.norm(dim=1) + scored.z_TM.norm(dim=1), torch.inf)
    pool = [p for p in range(1, len(away) - QUESTION) if p not in needed]
    found: list[int] = []
    for p in needed:
        near = sorted((q for q in pool if q not in found), key=lambda q: abs(float(away[q] - away[p])))[:20]
        found.append(int(rng.choice(near)))
    return found


def main(folder: Path, count: int = 60) -> dict[str, Any]:
    """Numbers over puzzles."""
    model, sae = load_model(shipped("models/probe-recall/checkpoint")), read_sae(folder)
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(float(value))

    for truth in puzzles(count):
        assert truth.needed_causal is not None
        needed = truth.needed_causal[0]
        prompt = prompt_of(model, sae, truth)
        scored = prompt.scored(steps=STEPS)
        s = scored[LAYER]
        random = alike(s, needed, rng)
        for method in (GRADIENT, INTEGRATED):
            note(f"needed positions are the top two, {method}", ranks(s, method, needed) == [1, 2])
            note(f"random positions are the top two, {method}", ranks(s, method, random) == [1, 2])
        total, should = s.completeness(prompt.metric)
        note("integrated gradients: relative gap", abs(total - should) / abs(should))
        sets = [nodes_at(s, [p]) for p in needed] + [nodes_at(s, needed), nodes_at(s, random)]
        lost = prompt.metric - prompt.ablated(sets)
        note("metric", prompt.metric)
        note("lost without one needed position", float(np.mean(lost[:2])))
        note("lost without both", lost[2])
        note("lost without two random positions", lost[3])
        top = top_nodes(scored, GRADIENT, 10)
        groups = matched(scored, top, 5, rng)
        note("top ten nodes at needed positions or the last", np.mean([n.position in (*needed, 163) for n in top]))
        randoms = [n for g in groups for n in g]
        note("random nodes there", np.mean([n.position in (*needed, 163) for n in randoms]))
        raising = [n for n in top if s.of(n, GRADIENT) > 0]
        beside = [g for n, g in zip(top, groups, strict=True) if n in raising]
        joint_sets = random_sets(raising, beside, rng)
        nodes = [*top, *randoms]
        lost = prompt.metric - prompt.ablated([[n] for n in nodes] + [raising, *joint_sets])
        verdict = judge(
            np.array([s.of(n, GRADIENT) for n in nodes]),
            lost[: len(nodes)],
            np.array([*range(len(top)), *(i for i, g in enumerate(groups) for _ in g)]),
            np.arange(len(nodes)) < len(top),
            joint=float(lost[len(nodes)]),
            joint_random=lost[len(nodes) + 1 :],
            error_share=s.error_share(GRADIENT),
        )
        note("check passed", verdict.passed)
        note("rank correlation of single ablations", verdict.rho)
        note("error share", verdict.error_share)
    return {
        "sae": weights_sha256(folder),
        "puzzles": count,
        "means": {name: round(float(np.mean(values)), 4) for name, values in found.items()},
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])), indent=1))
