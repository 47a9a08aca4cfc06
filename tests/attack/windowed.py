"""A tiny model of random weights whose layers attend to a window, but for each fourth: SGLang keeps the entries of the
former in a pool of their own, and drops them past the window."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from sglang_probe.prove.traffic import Traffic
from sglang_probe.workload.request import Request, SegmentSpan
from tests.attack.tokenizer import give_tokenizer

WINDOW = 48
"""Positions that a sliding layer attends to: shorter than most prompts of the traffic."""


def make_windowed(folder: Path) -> Path:
    """A Mellum of four layers and width 64 without experts, with the tokenizer of `probe-text`.

    Of the models with two pools it is one that SGLang serves with attention in PyTorch. Gemma 4 and gpt-oss ask for
    attention of accelerators (`arg_groups/model_hook.py`), and Gemma 3 gets one pool whatever its configuration says
    (`arg_groups/model_overrides/gemma2_gemma3.py`).
    """
    from transformers import MellumConfig, MellumForCausalLM

    torch.manual_seed(0)
    config = MellumConfig(
        vocab_size=3072,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        mlp_layer_types=["dense"] * 4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = MellumForCausalLM(config)
    model.model.embed_tokens.weight.data[0].normal_(std=0.02)  # zero for padding, and so the row of a refused prompt
    model.save_pretrained(folder)
    give_tokenizer(folder)
    return folder


def renewed_prefixes(seed: int, requests: int, vocabulary: int) -> list[Traffic]:
    """Prompts that are computed again after the tree has lost their sliding entries, and reused after that.

    Twelve prefixes at a time: each is served once, by which time the entries of the earlier ones have been driven out
    of the small pool; then each is asked again, which computes it and puts the new entries in the place of the old ones
    in all layers, and a third request reuses it at once.
    """
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(10, vocabulary) for _ in range(n)]

    prompts: list[list[int]] = []
    while len(prompts) < requests:
        prefixes = [tokens(rng.randint(150, 250)) for _ in range(12)]
        prompts += [p + tokens(20) for p in prefixes]
        prompts += [p + tokens(20) for p in prefixes for _ in range(2)]
    params = {"max_new_tokens": 4, "temperature": 1.0, "ignore_eos": True}
    return [
        Traffic(Request(i, f"r{i:06d}", tuple(p), (SegmentSpan("prompt", 0, len(p)),), None, params))
        for i, p in enumerate(prompts[:requests])
    ]
