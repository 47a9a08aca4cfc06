"""What each token id stands for: its bytes, and whether it is special. Read from `tokenizer.json`.

Two families of tokenizers write bytes into their vocabulary. Byte-level BPE (GPT-2, Llama 3, Qwen) spells every byte
as a printable character; sentencepiece (Llama 2, Gemma, Mistral) writes a leading space as U+2581 and a byte that it
has no piece for as `<0x0A>`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_probe.errors import ConfigError

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """`pieces[id]` are the bytes of a token, empty for ids that are not used; special tokens spell their name."""

    pieces: tuple[bytes, ...]
    special: np.ndarray[Any, np.dtype[np.bool_]]
    fallback: np.ndarray[Any, np.dtype[np.bool_]]
    """Tokens that stand for a single byte outside ASCII, or are `<0x..>`: characters in pieces."""

    def __len__(self) -> int:
        return len(self.pieces)

    def text(self, token: int) -> str:
        """A token as text: bytes that are no characters as `\\xNN`, ids that are not in use as `<ID>`."""
        piece = self.pieces[token] if 0 <= token < len(self.pieces) else b""
        return piece.decode(errors="backslashreplace") if piece else f"<{token}>"

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Read `tokenizer.json` of a model's folder, or have `transformers` make one of what is there.

        Raises:
            ConfigError: the folder holds no tokenizer.
        """
        file = folder / "tokenizer.json"
        if file.exists():
            return cls.parse(json.loads(file.read_text(encoding="utf-8")))
        try:
            from transformers import AutoTokenizer

            return cls.parse(json.loads(AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer.to_str()))
        except Exception as e:  # slow tokenizers, missing files, missing packages
            raise ConfigError(f"no tokenizer could be read from {folder}: {e}", fix="give a model's folder") from e

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Vocabulary:
        """From the parsed JSON of a `tokenizers` file, of BPE, unigram or WordPiece kind."""
        vocab = data["model"]["vocab"]
        entries = vocab.items() if isinstance(vocab, dict) else ((piece, i) for i, (piece, _) in enumerate(vocab))
        by_id = {int(i): piece for piece, i in entries}
        added = {int(t["id"]): t for t in data.get("added_tokens", [])}
        size = 1 + max([*by_id, *added], default=-1)
        unspell = _byte_of if _is_byte_level(data) else None
        pieces, special, fallback = [b""] * size, np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        for i, piece in by_id.items():
            pieces[i], fallback[i] = _bytes(piece, unspell)
        for i, token in added.items():  # added tokens stand in the vocabulary as plain text, spelled as they are
            pieces[i], fallback[i], special[i] = token["content"].encode(), False, bool(token["special"])
        return cls(tuple(pieces), special, fallback)


def _bytes(piece: str, unspell: dict[str, int] | None) -> tuple[bytes, bool]:
    if unspell is None:
        if match := _BYTE.fullmatch(piece):
            return bytes([int(match[1], 16)]), True
        return piece.replace(_SPACE, " ").encode(), False
    if not all(c in unspell for c in piece):
        return piece.encode(), False
    raw = bytes(unspell[c] for c in piece)
    try:
        raw.decode()
    except UnicodeDecodeError:
        return raw, True
    return raw, False


def _is_byte_level(data: dict[str, Any]) -> bool:
    def kinds(part: Any) -> list[str]:
        inner = [k for key in ("pretokenizers", "decoders") for p in (part or {}).get(key, []) for k in kinds(p)]
        return [(part or {}).get("type", ""), *inner]

    return "ByteLevel" in kinds(data.get("pre_tokenizer")) + kinds(data.get("decoder"))


def _spelling() -> dict[str, int]:
    """Which character spells which byte in byte-level BPE (GPT-2): printable ones themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


_byte_of = _spelling()
