"""Tiny Llamas over a list of words, trained from scratch: what the recipes of models with a planted truth share.

`models/probe-recall/train.py` and `experiments/clamp-case/model.py` draw the texts, and say when to stop; the model,
its tokenizer, the loss and one step of training are here.

Shapes: B texts of T tokens, G graded positions, V words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_probe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

UNGRADED = -100
"""A target that is no part of the loss."""
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def llama(ids: Mapping[str, int], *, layers: int, context: int, **more: Any) -> LlamaForCausalLM:
    """A Llama of width 128 with grouped-query attention and tied embeddings, weights drawn by torch's generator.

    Args:
        ids: number of each word, `PAD`, `BOS` and `EOS` among them.
        more: of `LlamaConfig`.

    Raises:
        ConfigError: `transformers` is missing.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as e:
        raise ConfigError(f"a model is made by transformers: {e}", fix="pip install transformers") from e

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(ids),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            initializer_range=0.04,
            bos_token_id=ids[BOS],
            eos_token_id=ids[EOS],
            pad_token_id=ids[PAD],
            attn_implementation="sdpa",
            **more,
        )
    )


def tokenizer(ids: Mapping[str, int], *, context: int, bos: bool) -> PreTrainedTokenizerFast:
    """One token a word, words parted by spaces. `bos`: it is put before every prompt.

    Raises:
        ConfigError: `transformers` or `tokenizers` is missing.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast
    except ImportError as e:
        raise ConfigError(f"a tokenizer is made by transformers: {e}", fix="pip install transformers") from e

    words = Tokenizer(models.WordLevel(dict(ids), unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        words.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, ids[BOS])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )


def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """Rows of different lengths, `[B, T]` int64; padding stands on the right, where no causal model sees it."""
    width = max(map(len, rows))
    return torch.tensor([[*r, *[fill] * (width - len(r))] for r in rows])


def graded_logits(
    model: LlamaForCausalLM, ids_BT: torch.Tensor, targets_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits `[G, V]` where a target is graded, these targets `[G]`, and which positions they are, bool `[B, T]`."""
    hidden = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    graded = targets_BT != UNGRADED
    return model.lm_head(hidden[graded]), targets_BT[graded], graded


def optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.Optimizer:
    """AdamW as all recipes have it."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)


def descend(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    """One step down the loss, gradients clipped to a norm of 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    torch.autograd.backward([loss])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
