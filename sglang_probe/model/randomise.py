"""A model as it was before training: the null of everything that is read off its activations.

Dictionaries of randomly initialised transformers have features whose labels score much like those of trained ones
(Heap et al. 2501.17727). So the same texts through the same architecture without training, and a dictionary of that by
the same recipe, is what scores of labels stand beside (`sglang-probe features --random-run --random-sae`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sglang_probe.errors import ConfigError

COPIED = ("tokenizer*", "*.jinja", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model")
"""What makes the same token ids of the same text."""


def randomise(checkpoint: Path, folder: Path, *, seed: int = 0, keep_embeddings: bool = False) -> Path:
    """Write a checkpoint of the same configuration and tokenizer with the weights that training would begin with.

    Args:
        checkpoint: folder of a Hugging Face model.
        seed: of the initialisation, which is the architecture's own (`initializer_range` of its configuration).
        keep_embeddings: keep the token embeddings (and the head, where it is tied to them) of the checkpoint.

    Raises:
        ConfigError: the folder is there, the checkpoint cannot be read, or `transformers` is missing.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as e:
        raise ConfigError(f"a model is initialised by transformers: {e}", fix="pip install transformers") from e
    if folder.exists():
        raise ConfigError(f"{folder} is there", fix="name another folder")
    try:
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        trained = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True) if keep_embeddings else None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{checkpoint} is no model that transformers can read: {e}") from e
    dtype = getattr(config, "dtype", None) or torch.float32  # of the files; `from_config` writes over it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if trained is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(trained.get_input_embeddings().weight)
    half = folder.with_name(f".{folder.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    model.to(dtype).save_pretrained(half)
    for pattern in COPIED:
        for file in checkpoint.glob(pattern):
            if file.is_file():
                shutil.copy(file, half / file.name)
    half.rename(folder)
    return folder
