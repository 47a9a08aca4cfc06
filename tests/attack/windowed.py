"""A tiny model of random weights whose layers attend to a window, but for each fourth: SGLang keeps the entries of the
former in a pool of their own, and drops them past the window."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from sglang_probe.paths import shipped

WINDOW = 48
"""Positions that a sliding layer attends to: shorter than most prompts of the traffic."""


def make_windowed(folder: Path) -> Path:
    """A Gemma 3 of four layers and width 64, with the tokenizer of `probe-text`.

    `is_hybrid_swa` in the configuration asks SGLang for the second pool, which Gemma 4 and gpt-oss have without asking;
    these two SGLang serves with attention kernels of accelerators alone (`arg_groups/model_hook.py`).
    """
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=3072,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=2048,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text())
    told |= {"is_hybrid_swa": True, "hybrid_layer_pattern": [1, 1, 1, 0]}
    (folder / "config.json").write_text(json.dumps(told))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(shipped("models/probe-text/checkpoint") / name, folder / name)
    return folder
