"""Axes that read tokens: the vocabulary, kinds of text, patterns."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sglang_probe.axes.axis import Axis
from sglang_probe.axes.batch import Batch
from sglang_probe.axes.lexical import Lexical, kind_of
from sglang_probe.axes.pattern import Pattern
from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError
from sglang_probe.paths import shipped

Make = Callable[..., Batch]
Classes = Callable[[Axis, Batch], list[str]]

SENTENCEPIECE = {
    "model": {
        "type": "BPE",
        "byte_fallback": True,
        "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "<0xC3>": 3, "\u2581the": 4, "ing": 5, "\u2581": 6, "é": 7},
    },
    "added_tokens": [{"id": 0, "content": "<unk>", "special": True}, {"id": 1, "content": "<s>", "special": True}],
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]},
}


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    return Vocabulary.parse(json.loads(tokenizer.backend_tokenizer.to_str()))


def test_pieces_of_byte_level_tokens_make_up_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = 'def f(x):\n\treturn "naïve – 東京 🙂"  # tab\n'
    vocabulary = vocabulary_of(tokenizer)
    ids = tokenizer(text)["input_ids"]
    assert b"".join(vocabulary.pieces[i] for i in ids).decode() == text
    assert len(vocabulary) == len(tokenizer)


def test_special_tokens_spell_their_name(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = vocabulary_of(tokenizer)
    (end,) = tokenizer("<|end|>")["input_ids"]
    assert (vocabulary.pieces[end], bool(vocabulary.special[end])) == (b"<|end|>", True)
    assert vocabulary.special.sum() == 6


def test_sentencepiece_writes_spaces_and_bytes_in_its_own_way() -> None:
    vocabulary = Vocabulary.parse(SENTENCEPIECE)
    assert vocabulary.pieces[2:] == (b"\n", b"\xc3", b" the", b"ing", b" ", "é".encode())
    assert vocabulary.fallback.tolist() == [False, False, True, True, False, False, False, False]


def test_the_built_in_model_has_a_vocabulary() -> None:
    vocabulary = Vocabulary.load(shipped("models/probe-text/checkpoint"))
    assert (len(vocabulary), int(vocabulary.special.sum())) == (3072, 6)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer could be read"):
        Vocabulary.load(tmp_path)


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (" the", "word start"),
        ("ing", "word piece"),
        ("The", "word piece"),
        (" return", "keyword"),
        ("None", "keyword"),
        (" is_empty", "identifier"),
        ("camelCase", "identifier"),
        (" utf8", "identifier"),
        ("_", "punctuation"),
        ("__", "punctuation"),
        (" 1815", "digit"),
        ("):", "punctuation"),
        (" +=", "punctuation"),
        ("  ", "whitespace"),
        ("\n    ", "newline"),
        ("東京", "non-ASCII"),
        (" naïve", "non-ASCII"),
        ("x)", "mixed"),
    ],
)
def test_kinds_of_text(piece: str, kind: str) -> None:
    assert kind_of(piece.encode()) == kind


def test_lexical_classes_of_special_unknown_and_byte_tokens(make_batch: Make, classes: Classes) -> None:
    axis = Lexical(Vocabulary.parse(SENTENCEPIECE))
    found = classes(axis, make_batch([1, 2, 3, 4, 5, 6, 7, -1, 999]))
    expected = ["special", "byte fallback", "byte fallback", "word start", "word piece", "whitespace", "non-ASCII"]
    assert found == [*expected, "unknown", "unknown"]


def test_a_pattern_marks_the_tokens_that_it_overlaps(
    tokenizer: PreTrainedTokenizerFast, make_batch: Make, classes: Classes
) -> None:
    texts = ["born in 1815, é in 1852", "é1999é", "nothing"]
    ids = [tokenizer(t)["input_ids"] for t in texts]
    offsets = [tokenizer(t, return_offsets_mapping=True)["offset_mapping"] for t in texts]
    found = classes(Pattern("year", r"\d{4}", vocabulary_of(tokenizer)), make_batch(*ids))
    expected = [
        "match" if any(c.isdigit() for c in text[a:b]) else "other"
        for text, spans in zip(texts, offsets, strict=True)
        for a, b in spans
    ]
    assert found == expected
    assert expected.count("match") >= 3


def test_named_groups_are_classes_and_the_first_match_counts(
    tokenizer: PreTrainedTokenizerFast, make_batch: Make, classes: Classes
) -> None:
    axis = Pattern("kind", r"(?P<number>\d)|(?P<mark>[!?])|x", vocabulary_of(tokenizer))
    assert axis.classes == ["number", "mark", "other", "unknown"]
    ids = [i for c in ("7", "!", "x", "a") for i in tokenizer(c)["input_ids"]]
    assert classes(axis, make_batch([*ids, -1])) == ["number", "mark", "other", "other", "unknown"]


def test_a_pattern_does_not_run_from_one_request_into_the_next(
    tokenizer: PreTrainedTokenizerFast, make_batch: Make, classes: Classes
) -> None:
    a, b = (tokenizer(c)["input_ids"] for c in ("a", "b"))
    axis = Pattern("ab", "ab", vocabulary_of(tokenizer))
    assert classes(axis, make_batch(a, b)) == ["other"] * 2
    assert classes(axis, make_batch([*a, *b])) == ["match"] * 2


def test_a_pattern_that_is_none_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        Pattern("x", "(", vocabulary_of(tokenizer))


def test_every_piece_of_a_vocabulary_has_a_kind(tokenizer: PreTrainedTokenizerFast) -> None:
    axis = Lexical(vocabulary_of(tokenizer))
    assert axis._table.max() < len(axis.classes)
    assert np.unique(axis._table).size >= 8
