"""Attribution: exact where a model is linear, complete along the line where it is not, and ablations that are real."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.sae import attribution_check
from sglang_probe.sae.attribution import (
    EMBEDDING,
    ERROR,
    FEATURE,
    GRADIENT,
    INTEGRATED,
    Node,
    Prompt,
    Site,
    share_of,
)
from sglang_probe.sae.attribution_check import judge, matched, random_sets, top_nodes
from sglang_probe.sae.sae import SAE
from sglang_probe.steer_ask import Steer
from sglang_probe.steering.card import Card, MadeBy
from sglang_probe.steering.library import Vector
from sglang_probe.steering.reference import Vectors, intervened
from sglang_probe.steering.resolve import spec_of
from tests.sae.linear import Linear, planted
from tests.sae.small import random_sae

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def everywhere(length: int, *layers: int) -> dict[int, torch.Tensor]:
    return {layer: torch.ones(length, dtype=torch.bool) for layer in layers}


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompt(llama: Any) -> Prompt:
    sites = [Site.of(layer, random_sae("jumprelu", 24, 40, seed=layer).scaled(3)) for layer in (1, 2)]
    weights = torch.zeros(16)
    weights[7], weights[2] = 1.0, -1.0
    return Prompt(llama, IDS, weights, sites, everywhere(len(IDS), 1, 2))


def test_a_planted_linear_model_is_recovered_exactly() -> None:
    toy = planted()
    found = toy.prompt.scored(steps=3)[0]
    for method in (GRADIENT, INTEGRATED):
        torch.testing.assert_close(found.features(method), toy.effects, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.errors(method), toy.error_effects, rtol=1e-5, atol=1e-5)
    # The two planted features, and nothing else, carry the metric.
    assert [(n.position, n.latent) for n in top_nodes({0: found}, GRADIENT, 2)] == toy.causes
    nodes = found.nodes()
    true = toy.prompt.metric - toy.prompt.ablated([[n] for n in nodes])
    assert true == pytest.approx([found.of(n, INTEGRATED) for n in nodes], abs=1e-4)
    assert toy.prompt.metric - toy.prompt.ablated([nodes])[0] == pytest.approx(true.sum(), abs=1e-3)


def test_what_an_earlier_node_sends_to_a_later_one_is_what_is_lost_without_it() -> None:
    toy = planted()
    scored = toy.prompt.scored(steps=0)
    later = [n for n in scored[1].nodes() if abs(scored[1].of(n, GRADIENT)) > 1e-4]
    assert {n.kind for n in later} == {FEATURE, ERROR}
    for n, gradient in zip(later, toy.prompt.edges(0, scored[1], later, GRADIENT), strict=True):
        part = share_of(scored[0], gradient)
        for u in scored[0].nodes():
            assert part.of(u, GRADIENT) == pytest.approx(toy.sent(u, n), abs=1e-4)


def test_integrated_gradients_sum_to_the_metric_less_that_of_the_baseline(prompt: Prompt) -> None:
    for steps, tolerance in ((10, 0.02), (40, 0.001)):
        for scored in prompt.scored(steps=steps).values():
            total, should = scored.completeness(prompt.metric)
            assert total == pytest.approx(should, rel=tolerance)
            # Gradients at the prompt alone do not: the model is not linear.
            alone = scored.features(GRADIENT).sum() + scored.errors(GRADIENT).sum()
            assert abs(float(alone) - should) > 0.05 * abs(should)


def test_another_baseline_is_where_the_line_begins_and_what_an_ablation_leaves(llama: Any, prompt: Prompt) -> None:
    sae = prompt.sites[1].sae
    z0, e0 = torch.rand(40, generator=torch.Generator().manual_seed(5)), torch.full((24,), 0.1)
    mine = Prompt(llama, IDS, prompt._weights, [Site.of(1, sae, z0, e0)], everywhere(len(IDS), 1))
    scored = mine.scored(steps=12)[1]
    total, should = scored.completeness(mine.metric)
    assert total == pytest.approx(should, rel=0.01)
    left = mine.ablated([scored.nodes()])[0]
    assert left == pytest.approx(scored.baseline, abs=1e-4)
    assert left == pytest.approx(
        float(mine.with_rows(1, (z0 @ sae.W_dec + sae.b_dec + e0).expand(1, 8, -1))[0]), abs=1e-4
    )


def test_an_ablation_is_the_engines_ablate_feature(llama: Any, prompt: Prompt) -> None:
    site = prompt.sites[1]
    nodes = [n for n in prompt.scored(steps=0)[1].nodes() if n.kind == FEATURE and n.position == 4]
    latent = max(nodes, key=prompt.scored(steps=0)[1].size).latent
    sae = site.sae
    assert sae.threshold is not None
    tensors = {
        "vector": sae.W_dec[latent],
        "encoder": sae.W_enc[:, latent],
        "encoder_bias": sae.b_enc[latent],
        "threshold": sae.threshold[latent],
        "decoder_bias": sae.b_dec,
    }
    card = Card(
        name="f",
        kind="feature",
        hook_point="blocks.1.hook_resid_post",
        width=24,
        model="tiny",
        model_weight_hash=None,
        norm=float(sae.W_dec[latent].norm()),
        layer_mean_norm=2.0,
        made_by=MadeBy(command="test"),
        sha256="0" * 64,
    )
    vector = Vector(card, tensors)
    ask = Steer.model_validate({"vector": "f", "op": "ablate_feature", "prompt_window": [4, 5], "phases": ["prefill"]})
    spec, known = spec_of([ask], {"f": vector}, where="test"), Vectors.of([vector])
    assert spec is not None
    assert known is not None
    with torch.no_grad(), intervened(llama, spec, len(IDS), known):
        logits = llama(torch.tensor([IDS])).logits[0, -1]
    ours = prompt.ablated([[Node(1, 4, FEATURE, latent)]])[0]
    assert ours == pytest.approx(float(logits[7] - logits[2]), abs=1e-5)
    assert abs(ours - prompt.metric) > 1e-3


def test_nodes_of_two_layers_are_ablated_one_after_the_other(prompt: Prompt) -> None:
    early, late = Node(1, 2, ERROR), Node(2, 6, ERROR)
    both = prompt.ablated([[early], [late], [early, late], []])
    assert both[3] == pytest.approx(prompt.metric, abs=1e-5)
    # The later error is what it has become, so that the two do not simply add up.
    assert abs((both[0] + both[1] - both[3]) - both[2]) > 1e-4


def test_rows_that_are_not_traced_keep_out_of_everything(llama: Any, prompt: Prompt) -> None:
    traced = everywhere(len(IDS), 1)
    traced[1][0] = False
    mine = Prompt(llama, IDS, prompt._weights, [prompt.sites[1]], traced)
    scored = mine.scored(steps=10)[1]
    assert {n.position for n in scored.nodes()} == set(range(1, 8))
    assert float(scored.features(INTEGRATED)[0].abs().sum() + scored.errors(INTEGRATED)[0].abs()) == 0
    total, should = scored.completeness(mine.metric)
    assert total == pytest.approx(should, rel=0.02)


def test_an_sae_without_rows_of_its_own_has_no_nodes() -> None:
    with pytest.raises(ConfigError, match="normalises rows"):
        Site.of(0, random_sae("standard", normalize="layer_norm"))


def test_random_nodes_are_of_the_layer_and_kind_and_about_as_large(prompt: Prompt) -> None:
    scored = prompt.scored(steps=0)
    top = top_nodes(scored, GRADIENT, 6)
    groups = matched(scored, top, 3, np.random.default_rng(0))
    everything = [n for g in groups for n in g]
    assert not set(everything) & set(top)
    assert len(set(everything)) == len(everything)
    for node, group in zip(top, groups, strict=True):
        assert len(group) == 3
        assert {(n.layer, n.kind) for n in group} == {(node.layer, node.kind)}
    ratio = [scored[n.layer].size(n) / scored[t.layer].size(t) for t, g in zip(top, groups, strict=True) for n in g]
    assert np.median(np.abs(np.log(ratio))) < np.log(1.5)


def _verdict(rng: np.random.Generator, informed: float, share: float = 0.1) -> Any:
    """Ten top nodes with five random ones each; predictions are `informed` of the truth, the rest noise."""
    true = rng.normal(size=200) ** 3
    predicted = informed * true + (1 - informed) * rng.normal(size=200) ** 3
    order = np.argsort(-np.abs(predicted))
    top, rest = order[:10], rng.permutation(order[10:])[:50]
    at = np.concatenate([top, rest])
    groups = np.concatenate([np.arange(10), np.repeat(np.arange(10), 5)])
    raising = np.flatnonzero(predicted[top] > 0)
    pools = [[top[g], *rest[5 * g : 5 * g + 5]] for g in raising]
    sets = [true[[rng.choice(p) for p in pools]].sum() for _ in range(39)]
    is_top = np.arange(60) < 10
    joint = float(true[top[raising]].sum())
    return judge(
        predicted[at], true[at], groups, is_top, joint=joint, joint_random=np.array(sets), error_share=share, seed=1
    )


def test_the_check_finds_true_attributions_and_holds_its_level_where_they_say_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attribution_check, "_DRAWS", 999)
    rng = np.random.default_rng(0)
    assert np.mean([_verdict(rng, 0.9).passed for _ in range(20)]) >= 0.8
    nothing = [_verdict(rng, 0.0) for _ in range(200)]
    assert sum(v.passed for v in nothing) == 0
    for p in ("rho_p", "larger_p", "joint_p"):
        assert np.mean([getattr(v, p) <= 0.05 for v in nothing]) <= 0.08, p  # 200 draws: 0.05 and two deviations


def test_errors_that_carry_most_of_it_fail_the_check_whatever_the_ranks() -> None:
    found = _verdict(np.random.default_rng(3), 1.0, share=0.6)
    assert not found.passed
    assert found.failures == ("what the SAEs do not explain carries 60 % of the attribution",)


def test_few_ablations_prove_nothing() -> None:
    few = np.arange(4.0)
    found = judge(
        few,
        few,
        np.array([0, 0, 1, 1]),
        np.array([1, 0, 1, 0], bool),
        joint=9.0,
        joint_random=np.zeros(39),
        error_share=0,
    )
    assert not found.passed
    assert "unknown from 4 nodes" in found.failures[0]


def test_random_sets_take_one_of_each_group() -> None:
    top = [Node(0, 0, FEATURE, 1), Node(0, 4, ERROR)]
    groups = [[Node(0, 1, FEATURE, 1), Node(0, 2, FEATURE, 1)], []]
    sets = random_sets(top, groups, np.random.default_rng(0), 50)
    assert {s[0] for s in sets} == {top[0], *groups[0]}
    assert all(s[1:] == [top[1]] for s in sets)


def test_the_embedding_is_the_layer_before_the_first(prompt: Prompt, llama: Any) -> None:
    torch.testing.assert_close(prompt.rows[EMBEDDING], llama.model.embed_tokens(torch.tensor(IDS)))
    assert isinstance(prompt.sites[1].sae, SAE)
    assert isinstance(planted().prompt._model, Linear)
