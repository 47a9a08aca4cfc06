"""A tokenizer of the built-in model's kind (models/probe-text/train.py), small enough to train per session."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template. Shared by all tests: change a copy (`with_template`), never this one."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([Path(json.__file__).read_text(encoding="utf-8")], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture
def with_template(tokenizer: PreTrainedTokenizerFast) -> Callable[[str | None], PreTrainedTokenizerFast]:
    """Makes a copy of the tokenizer that has another chat template."""

    def make(template: str | None) -> PreTrainedTokenizerFast:
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        return changed

    return make


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[[Sequence[Any]], Path]:
    """Writes a JSONL file; a string is written as the line it is, anything else as JSON."""

    def write(lines: Sequence[Any]) -> Path:
        path = tmp_path / "requests.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
        return path

    return write
