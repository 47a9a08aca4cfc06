"""Write the golden files: what kvpress 0.5.5 scores and keeps on tiny random models, on the CPU in float32.

kvpress pins a `transformers` that SGLang does not accept, so this runs in an environment of its own, by hand:

    python -m venv VENV && VENV/bin/pip install kvpress==0.5.5      # any CPU build of torch will do
    VENV/bin/python tests/eviction/golden/make_golden.py

Written with kvpress 0.5.5, transformers 5.2.0, torch 2.13.0. The files hold inputs (queries, keys, values, output
projections) and, for each case, scores before compression and kept positions; the metadata names each case in the terms
of `sglang_probe`. Nothing of sglang_probe is imported here.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import kvpress
import torch
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

HERE = Path(__file__).parent
LENGTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 64, 3, 4, 2, 16, 32
WINDOW = 8
RATIOS = (0.5, 0.75)

SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    # Large weights, so that attention is peaked and scores are far apart.
    "initializer_range": 0.35,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    ),
}

_snapkv = {"method": "snapkv", "window": WINDOW, "rows": "mean", "pooling": "avg", "kernel": 5}


def snap(ratio: float) -> kvpress.SnapKVPress:
    return kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=5)


CASES = {
    "knorm": (kvpress.KnormPress, {"method": "knorm"}),
    "keydiff": (kvpress.KeyDiffPress, {"method": "keydiff"}),
    "streaming_llm": (kvpress.StreamingLLMPress, {"method": "streaming_llm"}),
    "snapkv": (snap, _snapkv),
    "pyramidkv": (
        lambda r: kvpress.PyramidKVPress(r, window_size=WINDOW, kernel_size=5, beta=2),
        {**_snapkv, "method": "pyramidkv", "beta": 2},
    ),
    "tova": (kvpress.TOVAPress, {"method": "tova"}),
    "observed_attention": (kvpress.ObservedAttentionPress, {"method": "observed_attention"}),
    "expected_attention": (kvpress.ExpectedAttentionPress, {"method": "expected_attention"}),
    "expected_attention_mean_only": (
        lambda r: kvpress.ExpectedAttentionPress(r, n_future_positions=16, use_covariance=False, use_vnorm=False),
        {"method": "expected_attention", "future_positions": 16, "covariance": False, "value_norm": False},
    ),
    "expected_attention_epsilon": (
        lambda r: kvpress.ExpectedAttentionPress(r, epsilon=1e-2),
        {"method": "expected_attention", "epsilon": 1e-2},
    ),
    "criticalkv": (lambda r: kvpress.CriticalKVPress(snap(r)), {"method": "criticalkv", "base": _snapkv}),
    "criticalkv_expected": (
        lambda r: kvpress.CriticalKVPress(kvpress.ExpectedAttentionPress(r, use_vnorm=False)),
        {"method": "criticalkv", "base": {"method": "expected_attention", "value_norm": False}},
    ),
    "adakv": (
        lambda r: kvpress.AdaKVPress(snap(r), alpha_safeguard=0.4),
        {"method": "adakv", "base": _snapkv, "alpha": 0.4, "safeguard": "floor"},
    ),
    "adakv_expected": (
        lambda r: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(r, epsilon=1e-2)),
        {"method": "adakv", "base": {"method": "expected_attention", "epsilon": 1e-2}, "safeguard": "floor"},
    ),
    "critical_adakv": (
        lambda r: kvpress.CriticalAdaKVPress(snap(r), alpha_safeguard=0.4),
        {
            "method": "criticalkv",
            "base": {"method": "adakv", "base": _snapkv, "alpha": 0.4, "safeguard": "floor"},
        },
    ),
}


def capture(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Queries before and after RoPE, keys, values and output projections of every layer, with a leading layer axis."""
    pre: list[torch.Tensor] = []
    post: list[torch.Tensor] = []
    handles = []
    for layer in model.model.layers:

        def hook(module, _args, kwargs, _output) -> None:
            q = module.q_proj(kwargs["hidden_states"]).view(1, LENGTH, HEADS, HEAD_DIM)
            q = module.q_norm(q) if hasattr(module, "q_norm") else q
            q = q.transpose(1, 2)
            pre.append(q[0].transpose(0, 1))
            cos, sin = kwargs["position_embeddings"]
            post.append(apply_rotary_pos_emb(q, q, cos, sin)[0][0].transpose(0, 1))

        handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
    cache = DynamicCache()
    model.model(ids, past_key_values=cache)
    for handle in handles:
        handle.remove()
    w_o = [layer.self_attn.o_proj.weight.T.reshape(HEADS, HEAD_DIM, WIDTH) for layer in model.model.layers]
    return {
        "q_NHD": torch.stack(post),
        "q_pre_NHD": torch.stack(pre),
        "k_LGD": torch.stack([x.keys[0].transpose(0, 1) for x in cache.layers]),
        "v_LGD": torch.stack([x.values[0].transpose(0, 1) for x in cache.layers]),
        "w_o_HDM": torch.stack(w_o),
    }


def run(model: torch.nn.Module, ids: torch.Tensor, press: kvpress.BasePress, full_keys: torch.Tensor):
    """Scores `[layer, G, L]` (None for wrappers that compress by themselves) and kept positions of the same shape."""
    scores: list[torch.Tensor] = []
    original = getattr(press, "score", None)
    if original is not None:

        def record(*args, **kwargs):
            out = original(*args, **kwargs)
            scores.append(out[0].clone())
            return out

        press.score = record
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    cache = DynamicCache()
    with press(model):
        model.model(ids, past_key_values=cache)
    kept = torch.ones(LAYERS, KV_HEADS, LENGTH, dtype=torch.bool)
    for i, layer in enumerate(model.model.layers):
        masked = layer.self_attn.masked_key_indices
        if masked is not None:
            kept[i][masked[1], masked[2]] = False
            layer.self_attn.masked_key_indices = None
        else:
            # A kept key is found in the full cache by its content: rows are copied, so equality is exact.
            rows = cache.layers[i].keys[0]
            kept[i] = (full_keys[i].transpose(0, 1)[:, :, None] == rows[:, None]).all(-1).any(-1)
    return (torch.stack(scores) if scores else None), kept


def main() -> None:
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build().eval()
        # No token twice: the norms of repeated keys tie exactly, and torch breaks ties in no fixed order.
        ids = torch.randperm(SHAPE["vocab_size"])[None, :LENGTH]
        with torch.no_grad():
            for layer in model.model.layers:
                for norm in (getattr(layer.self_attn, n, None) for n in ("q_norm", "k_norm")):
                    if norm is not None:  # with weights of one all key norms are equal
                        norm.weight.uniform_(0.5, 2.0)
            # One backend for all: inputs captured under eager are those that every scorer saw.
            model.set_attn_implementation("eager")
            tensors = capture(model, ids)
            for case, (make, _) in CASES.items():
                for ratio in RATIOS:
                    model.set_attn_implementation("sdpa" if "ada" in case else "eager")
                    scores, kept = run(model, ids, make(ratio), tensors["k_LGD"])
                    if scores is not None:
                        tensors[f"{case}/{ratio}/scores"] = scores
                    tensors[f"{case}/{ratio}/kept"] = kept
        metadata = {
            "versions": {p: importlib.metadata.version(p) for p in ("kvpress", "transformers", "torch")},
            "rope": model.config.rope_parameters,
            "head_dim": HEAD_DIM,
            "ratios": RATIOS,
            "cases": {case: config for case, (_, config) in CASES.items()},
        }
        save_file(
            {k: v.detach().contiguous() for k, v in tensors.items()},
            HERE / f"{name}.safetensors",
            metadata={"golden": json.dumps(metadata)},
        )


if __name__ == "__main__":
    main()
