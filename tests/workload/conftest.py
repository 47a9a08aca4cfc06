"""Fixtures of `tests/small_tokenizer.py`."""

from __future__ import annotations

from tests.small_tokenizer import tokenizer, with_template, write_lines

__all__ = ["tokenizer", "with_template", "write_lines"]
