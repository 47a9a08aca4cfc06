"""A tokenizer for models of random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from sglang_probe.paths import shipped


def give_tokenizer(folder: Path) -> None:
    """Copy that of `probe-text` (3,072 tokens) beside a model."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(shipped("models/probe-text/checkpoint") / name, folder / name)
