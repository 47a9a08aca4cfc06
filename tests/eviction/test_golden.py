"""Scores and kept positions against kvpress 0.5.5, from files that `golden/make_golden.py` wrote in its environment."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sglang_probe.attention.rope import Rotary
from sglang_probe.attention.weights import AttentionSpec
from sglang_probe.eviction import Layer, parse_method
from sglang_probe.eviction.select import top_k

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("llama", "qwen3")
RATIOS = (0.5, 0.75)
CASES = [
    "adakv",
    "adakv_expected",
    "critical_adakv",
    "criticalkv",
    "criticalkv_expected",
    "expected_attention",
    "expected_attention_epsilon",
    "expected_attention_mean_only",
    "keydiff",
    "knorm",
    "observed_attention",
    "pyramidkv",
    "snapkv",
    "streaming_llm",
    "tova",
]


@cache
def golden(model: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = GOLDEN / f"{model}.safetensors"
    with safe_open(path, "pt") as f:
        return load_file(path), json.loads(f.metadata()["golden"])


def layers(model: str, **replaced: Tensor) -> Layer:
    """All layers of a golden model at once."""
    tensors, meta = golden(model)
    names = ("q_NHD", "q_pre_NHD", "k_LGD", "v_LGD", "w_o_HDM")
    n = len(tensors["q_NHD"])
    return Layer(
        **{**{k: tensors[k] for k in names}, **replaced},
        spec=AttentionSpec(scaling=meta["head_dim"] ** -0.5),
        rotary=Rotary.from_model_config({"head_dim": meta["head_dim"], "rope_parameters": meta["rope"]}),
        index=torch.arange(n),
        num_layers=n,
    )


def test_the_cases_are_those_of_the_golden_files() -> None:
    for model in MODELS:
        tensors, meta = golden(model)
        assert sorted(meta["cases"]) == CASES
        assert {k for k in tensors if k.endswith("kept")} == {f"{c}/{r}/kept" for c in CASES for r in RATIOS}
        assert meta["versions"]["kvpress"] == "0.5.5"


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_kept_positions_are_those_of_kvpress(model: str, case: str, ratio: float) -> None:
    tensors, meta = golden(model)
    layer, expected = layers(model), tensors[f"{case}/{ratio}/kept"]
    method = parse_method(meta["cases"][case])
    budget = int(layer.length * (1 - ratio))
    if case == "pyramidkv":
        # The line of budgets is drawn differently (see PyramidKV); the choice under equal budgets must agree.
        kept = top_k(method.scores(layer), expected.sum(-1), method.protected(layer, budget))
    else:
        kept = method.select(layer, budget).keep_GL
    assert torch.equal(kept, expected)


# AdaKV and CriticalAdaKV have no score of their own; StreamingLLM scores only in or out.
SCORED = [c for c in CASES if "ada" not in c and c != "streaming_llm"]


@pytest.mark.parametrize("case", SCORED)
@pytest.mark.parametrize("model", MODELS)
def test_scores_are_those_of_kvpress_to_rounding(model: str, case: str) -> None:
    tensors, meta = golden(model)
    layer, expected = layers(model), tensors[f"{case}/0.75/scores"]
    method = parse_method(meta["cases"][case])
    ours = method.scores(layer)
    # kvpress writes a large value over what it always keeps, CriticalKV also over its first stage.
    free = ~method.protected(layer, layer.length).expand(ours.shape) & (expected < 1e30)
    assert free.sum() > ours.numel() // 2
    largest = float(expected[free].abs().max())
    torch.testing.assert_close(ours[free], expected[free], rtol=3e-6, atol=2e-7 * largest)


@pytest.mark.parametrize("case", ["snapkv", "tova", "observed_attention", "expected_attention", "keydiff"])
def test_shuffled_keys_change_the_kept_positions(case: str) -> None:
    tensors, meta = golden("llama")
    shuffled = tensors["k_LGD"][:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    kept = parse_method(meta["cases"][case]).select(layers("llama", k_LGD=shuffled), 16).keep_GL
    assert (kept & tensors[f"{case}/0.75/kept"]).sum() < 0.9 * kept.sum()


def test_the_window_from_a_wrong_position_changes_the_kept_positions() -> None:
    tensors, meta = golden("llama")
    rolled = tensors["q_NHD"].roll(24, dims=1)
    kept = parse_method(meta["cases"]["snapkv"]).select(layers("llama", q_NHD=rolled), 16).keep_GL
    assert (kept & tensors["snapkv/0.75/kept"]).sum() < 0.9 * kept.sum()


@pytest.mark.parametrize("model", MODELS)
def test_captured_queries_unrotate_to_the_queries_before_rope(model: str) -> None:
    tensors, _ = golden(model)
    layer = layers(model)
    assert layer.rotary is not None
    pre = layer.rotary.unrotate(tensors["q_NHD"], torch.arange(layer.length))
    torch.testing.assert_close(pre, tensors["q_pre_NHD"], rtol=1e-5, atol=2e-6)
