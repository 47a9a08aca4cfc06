"""A folder in Hugging Face format from a GGUF file of a Llama: weights, configuration and tokenizer.

Weights are dequantised to float32 by the package `gguf`, whose values are exact, and rounded once to bfloat16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.errors import UnsupportedError
from sglang_probe.model.tokenizer import write_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_A_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}

Tell = Callable[[int, int], None]
"""Told how many of how many tensors are done."""


def write_folder(gguf: Path, folder: Path, tell: Tell = lambda _done, _of: None) -> None:
    """Write a model folder that `transformers` and SGLang load.

    Args:
        gguf: a GGUF file of architecture `llama`.
        folder: where to; exists.
        tell: called after each tensor.

    Raises:
        UnsupportedError: not a Llama, a tensor that a Llama has not, a tokenizer that is not known, or the package
            `gguf` is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise UnsupportedError(
            f"a GGUF file cannot be read: {e}", fix="pip install 'sglang-probe[model]' (SGLang brings it as well)"
        ) from e
    from safetensors.torch import save_file

    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError) as e:
        raise UnsupportedError(f"{gguf} is not a GGUF file: {e}") from e
    fields = {key: field.contents() for key, field in reader.fields.items()}
    if (architecture := fields.get("general.architecture")) != "llama":
        raise UnsupportedError(f"{gguf} holds a model of architecture {architecture}; known: llama")
    config = llama_config(fields, tied=all(t.name != "output.weight" for t in reader.tensors))
    weights = dict(_weights(reader.tensors, config, tell))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors lets nobody but the owner read what it writes; a cache may be shared.
    (folder / "model.safetensors").chmod(0o666 & ~_umask())
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    for name, content in (("config", config), ("generation_config", ids)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(fields, config["max_position_embeddings"], folder)


def llama_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """`config.json` of a Llama from the metadata of its GGUF file.

    Raises:
        UnsupportedError: rotary scaling, which GGUF files describe in several ways.
    """
    if scaled := [key for key in fields if key.startswith("llama.rope.scaling")]:
        raise UnsupportedError(f"the GGUF file scales its rotary embedding ({', '.join(scaled)}), which is not read")
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    theta = float(fields["llama.rope.freq_base"])
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": fields.get("llama.rope.dimension_count", width // heads),
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        # Stored as float32: 1e-5 comes as 9.99999975e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,  # as transformers 4 reads it
        "tie_word_embeddings": tied,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        **{name: i for name, i in ids.items() if i is not None},
    }


_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _weights(tensors: list[Any], config: dict[str, Any], tell: Tell) -> Iterator[tuple[str, Tensor]]:
    """Name and bfloat16 weight of each tensor."""
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for done, tensor in enumerate(tensors, 1):
        name, part = hugging_face_name(tensor.name), tensor.name.split(".")[-2]
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if part in heads:
            weight = unpermuted(weight, heads[part])
        yield name, weight.to(torch.bfloat16).contiguous()
        tell(done, len(tensors))


def _umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


def hugging_face_name(name: str) -> str:
    """Name of a Llama's weight as `transformers` has it: `blk.3.attn_q.weight` is layer 3's `self_attn.q_proj.weight`.

    Raises:
        UnsupportedError: a Llama has no such weight.
    """
    match name.split("."):
        case [part, "weight"] if part in _OUTSIDE:
            return f"{_OUTSIDE[part]}.weight"
        case ["blk", layer, part, "weight"] if part in _IN_A_BLOCK:
            return f"model.layers.{layer}.{_IN_A_BLOCK[part]}.weight"
    raise UnsupportedError(f"the GGUF file has a tensor `{name}`, which a Llama has not")


def unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection `[heads * dim, width]` in the order of `transformers`.

    llama.cpp rotates neighbouring rows of a head, `transformers` rows that are half a head apart.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)
