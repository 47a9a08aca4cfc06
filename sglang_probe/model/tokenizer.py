"""The tokenizer that a GGUF file describes, as files that `transformers` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_probe.errors import UnsupportedError

_NORMAL, _CONTROL = 1, 3
"""Kinds of tokens in a GGUF file (`TokenType` of the package `gguf`)."""

SPLITS = ("smollm",)
"""Values of `tokenizer.ggml.pre` that `write_tokenizer` knows. The value names how llama.cpp cuts text before BPE;
for another value, text would be cut otherwise than the model was trained, and nothing would look wrong."""


def write_tokenizer(fields: dict[str, Any], context_length: int, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

    `transformers` converts GGUF tokenizers itself, but without the cut at every digit, which is part of what the
    model's own tokenizer file says.

    Args:
        fields: metadata of the GGUF file, by key.
        context_length: positions of the model.
        folder: where to; exists.

    Raises:
        UnsupportedError: another kind of tokenizer than byte-level BPE cut as `SPLITS` says.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind[0] != "gpt2" or kind[1] not in SPLITS:
        raise UnsupportedError(f"the GGUF file has a tokenizer of kind {kind[0]}/{kind[1]}; known: gpt2/{SPLITS[0]}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    if unknown := set(kinds) - {_NORMAL, _CONTROL}:
        raise UnsupportedError(f"the GGUF file has tokens of kinds {sorted(unknown)}; known: {_NORMAL}, {_CONTROL}")
    merges = [_pair(merge) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in named.items()}
    config = {
        # Not `GPT2Tokenizer`: transformers 5 gives that class a pre-tokenizer of its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        **{name: tokens[i] for name, i in ids.items() if i is not None},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if template := fields.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
