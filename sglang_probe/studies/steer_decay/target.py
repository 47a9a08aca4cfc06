"""The tokens whose log-odds are the effect of a vector, and what a prediction says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_probe.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from sglang_probe.eviction.likelihood import Unembedding


def token_ids(model: Path, tokens: Sequence[str | int]) -> list[int]:
    """Ids of tokens that are named by text or id.

    Raises:
        ConfigError: a text is not one token of the model, or the model's vocabulary cannot be read from its
            `tokenizer.json`.
    """
    if all(isinstance(t, int) for t in tokens):
        return [int(t) for t in tokens]
    path = model / "tokenizer.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = {**dict(told["model"]["vocab"]), **{t["content"]: t["id"] for t in told.get("added_tokens", [])}}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path} has no vocabulary to look tokens up in: {e}", fix="give token ids") from e
    found = []
    for token in tokens:
        if isinstance(token, int):
            found.append(token)
            continue
        # Byte-level vocabularies write a space as U+0120, SentencePiece's as U+2581, and a newline as U+010A.
        byte_level = token.replace(" ", "\u0120").replace("\n", "\u010a")
        ids = [vocabulary[t] for t in (token, byte_level, token.replace(" ", "\u2581")) if t in vocabulary]
        if not ids:
            raise ConfigError(f"target: {token!r} is not one token of this model", fix="give its id, or other words")
        found.append(int(ids[0]))
    return found


def lens_tokens(vector_M: torch.Tensor, unembedding: Unembedding, k: int) -> tuple[list[int], list[int]]:
    """The k tokens that a direction favours most by the unembedding alone, and the k that it favours least."""
    scores = (vector_M.float() * unembedding.norm_M) @ unembedding.weight_VM.T
    k = min(k, len(scores) // 2)
    order = scores.argsort(descending=True)
    return order[:k].tolist(), order[-k:].tolist()


def log_odds(logp_NV: torch.Tensor, positive: Sequence[int], negative: Sequence[int]) -> torch.Tensor:
    """Log-odds of the positive tokens against the negative ones, in nats, `[N]`: `lse(logp[+]) - lse(logp[-])`."""
    return logp_NV[:, list(positive)].logsumexp(-1) - logp_NV[:, list(negative)].logsumexp(-1)
