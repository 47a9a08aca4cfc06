"""A tiny model of random weights with multi-head latent attention: the cache holds one latent vector a position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.attack.tokenizer import give_tokenizer

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    # The only rotation that SGLang has without an accelerator.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
"""Fields of the configuration that other models do not have."""
ROUTING = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""What DeepSeek's own configuration says, SGLang asks for, and `transformers` has no field for."""


def make_latent(folder: Path) -> Path:
    """A DeepSeek V3 of three layers and width 64, the first of them dense, with the tokenizer of `probe-text`."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=3072,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        moe_intermediate_size=32,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        **LATENT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = DeepseekV3ForCausalLM(config)
    model.model.embed_tokens.weight.data[0].normal_(std=0.02)  # zero for padding, and so the row of a refused prompt
    model.save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **ROUTING}))
    give_tokenizer(folder)
    return folder
