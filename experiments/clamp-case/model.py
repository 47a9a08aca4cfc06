"""Train the model of the case, and its tokenizer: minutes on one thread."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dialogues import IDS, KINDS, NAMES, SHARES, dialogue

from sglang_probe.model import tiny

STEPS, BATCH, LR = 500, 32, 3e-3
TRAINING_NAMES = NAMES[:20]
"""The others are for the test."""


def train(folder: Path, seed: int) -> dict[str, Any]:
    """Write the model; what was run, and the loss on the replies at the end."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = tiny.llama(IDS, layers=3, context=256)
    optimizer = tiny.optimizer(model, LR)
    losses = []
    for step in range(STEPS):
        logits, targets, _ = tiny.graded_logits(model, *_batch(random.Random(f"{seed}/{step}")))
        loss = F.cross_entropy(logits, targets)
        tiny.descend(model, optimizer, loss, LR * (min(1, (step + 1) / 50) * max(0.02, 1 - step / STEPS)))
        losses.append(loss.item())
    model.save_pretrained(folder)
    tiny.tokenizer(IDS, context=256, bos=False).save_pretrained(folder)
    return {"steps": STEPS, "batch": BATCH, "seed": seed, "loss": sum(losses[-50:]) / 50, "threads": 1}


def _batch(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Dialogues and what is graded of them, the replies: `[B, T]` each, targets aligned with inputs."""
    rows, targets = [], []
    for kind in rng.choices(KINDS, [SHARES[k] for k in KINDS], k=BATCH):
        drawn = dialogue(kind, rng, TRAINING_NAMES)
        ids = [IDS[w] for w in (*drawn.prompt, *drawn.reply, tiny.EOS)]
        first = len(drawn.prompt)
        rows.append(ids[:-1])
        targets.append([*[tiny.UNGRADED] * (first - 1), *ids[first:]])
    return tiny.padded(rows, IDS[tiny.PAD]), tiny.padded(targets, tiny.UNGRADED)
