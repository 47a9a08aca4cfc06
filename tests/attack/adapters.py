"""LoRA adapters with random weights for the built-in model: under each of them a prefix has entries of its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sglang_probe.paths import shipped

_RANK = 4


def make_adapters(folder: Path, names: tuple[str, ...]) -> dict[str, object]:
    """Server arguments that serve `probe-text` with adapters of these names."""
    model = json.loads((shipped("models/probe-text/checkpoint") / "config.json").read_text())
    width, layers = model["hidden_size"], model["num_hidden_layers"]
    head = model.get("head_dim") or width // model["num_attention_heads"]
    outputs = {"q_proj": head * model["num_attention_heads"], "v_proj": head * model["num_key_value_heads"]}
    told = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 2 * _RANK, "target_modules": list(outputs), "bias": "none"}
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(layers):
            for module, out in outputs.items():
                at = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                tensors[f"{at}.lora_A.weight"] = torch.randn(_RANK, width, generator=generator) * 0.2
                tensors[f"{at}.lora_B.weight"] = torch.randn(out, _RANK, generator=generator) * 0.2
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text(json.dumps(told | {"task_type": "CAUSAL_LM"}))
        save_file(tensors, folder / name / "adapter_model.safetensors")
    paths = [f"{name}={folder / name}" for name in names]
    return {"enable_lora": True, "lora_paths": paths, "lora_backend": "torch_native", "max_loras_per_batch": 2}
