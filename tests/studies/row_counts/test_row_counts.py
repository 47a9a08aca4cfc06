"""Classes of row counts, on bits whose classes are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sglang_probe.studies.row_counts.products import PRODUCTS, products_json, read_products, row_classes, shapes
from sglang_probe.studies.row_counts.study import classes_of, in_words

MODEL = {
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 300,
}


@pytest.mark.parametrize(
    ("counts", "words"),
    [([], ""), ([3], "3"), ([3, 1, 2], "1-3"), ([1, 3, 4, 5, 9, 9], "1, 3-5, 9"), ([64, 16, 17], "16-17, 64")],
)
def test_numbers_in_words(counts: list[int], words: str) -> None:
    assert in_words(counts) == words


def test_row_counts_are_in_one_class_only_if_every_text_agrees() -> None:
    first = {
        ("prefill", 1): {"a": {b"x"}, "b": {b"y"}},
        ("decode", 1): {"b": {b"y"}, "a": {b"x"}},  # the same bits, whatever the order of the texts
        ("prefill", 2): {"a": {b"x"}, "b": {b"z"}},  # one text differs
        ("prefill", 3): {"a": {b"x"}, "b": {b"z"}},
        ("decode", 4): {"a": {b"x", b"w"}, "b": {b"z"}},  # four rows are not all that matters
        ("prefill", 128): {"a": {b"x"}, "b": {b"z"}},
    }
    found = classes_of(first, 128).to_dict("records")
    assert found == [
        {"class": "1", "prefill": "1", "decode": "1", "whole": False},
        {"class": "2", "prefill": "2-3", "decode": "", "whole": True},
        {"class": "varies", "prefill": "", "decode": "4", "whole": False},
    ]


def test_products_are_told_apart_by_their_bits() -> None:
    calls: list[int] = []

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        out = x @ w.T
        return out + 1e-3 if 2 <= len(x) < 5 else out.double().float()

    classes = row_classes(8, 4, torch.float64, [1, 2, 4, 5], multiply=product)
    assert sorted(set(calls)) == [1, 2, 4, 5]
    assert classes[1] == classes[2]
    assert classes[0] != classes[1] != classes[3]


def test_the_products_of_a_model_are_fused_as_sglang_fuses_them(tmp_path: Path) -> None:
    assert shapes(MODEL) == {
        "qkv": (576, (9 + 6) * 64),
        "attention output": (576, 576),
        "gate and up": (576, 3072),
        "down": (1536, 576),
        "head": (576, 300),
    }
    (tmp_path / PRODUCTS).write_text(products_json(MODEL, "float32", [4, 1, 4], prefix=3))
    machine, products = read_products(tmp_path)
    assert set(machine) == {"cpu", "instructions", "torch", "threads", "bf16 products"}
    assert products["rows"].tolist() == [1, 4] * 6
    assert json.loads((tmp_path / PRODUCTS).read_text())["dtype"] == "float32"
    nothing = read_products(tmp_path / "nowhere")
    assert nothing[0] == {}
    assert nothing[1].empty
