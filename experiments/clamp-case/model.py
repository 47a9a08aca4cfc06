"""Train the model of the case, and its tokenizer: minutes on one thread."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dialogues import IDS, KINDS, NAMES, SHARES, WORDS, dialogue
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STEPS, BATCH, LR, SEED = 500, 32, 3e-3, 0
TRAINING_NAMES = NAMES[:20]
"""The others are for the test."""


def train(folder: Path) -> dict[str, Any]:
    """Write the model; what was run, and the loss on the replies at the end."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.04,
            bos_token_id=IDS["<bos>"],
            eos_token_id=IDS["<eos>"],
            pad_token_id=IDS["<pad>"],
            attn_implementation="sdpa",
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 50) * max(0.02, 1 - s / STEPS))
    losses = []
    for step in range(STEPS):
        rng = random.Random(f"{SEED}/{step}")
        drawn = [dialogue(k, rng, TRAINING_NAMES) for k in rng.choices(KINDS, [SHARES[k] for k in KINDS], k=BATCH)]
        rows = [[IDS[w] for w in (*d.prompt, *d.reply, "<eos>")] for d in drawn]
        width = max(map(len, rows))
        ids = torch.tensor([r + [IDS["<pad>"]] * (width - len(r)) for r in rows])
        targets = ids[:, 1:].clone()
        for i, (d, row) in enumerate(zip(drawn, rows, strict=True)):
            targets[i, : len(d.prompt) - 1] = -100
            targets[i, len(row) - 1 :] = -100
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, len(WORDS)), targets.reshape(-1), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return {"steps": STEPS, "batch": BATCH, "seed": SEED, "loss": sum(losses[-50:]) / 50, "threads": 1}


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(IDS, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
