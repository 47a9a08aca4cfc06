"""What must be known of a model before an engine is started: where it is, its layers, its context, its tokenizer."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sglang_probe.errors import ConfigError
from sglang_probe.model.catalogue import FETCHABLE, fetched_folder
from sglang_probe.paths import BUILT_IN_MODELS, shipped
from sglang_probe.run import journal

_NAME_ANOTHER = (
    "give a folder in Hugging Face format, a hub id that can be reached, or a name of `sglang-probe model list`"
)


@dataclass(frozen=True)
class Model:
    """A resolved model. `path` is a local folder or a hub id that `transformers` can load."""

    name: str
    path: str
    layers: int
    context_length: int
    architecture: str
    heads: int
    kv_heads: int
    head_dim: int
    config: dict[str, Any]
    """`config.json` of the text model, as `transformers` completes it."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model embeds."""
        return int(self.config["vocab_size"])

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as `transformers` loads it."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Identity for the manifest: name, architecture, and hashes of weights and tokenizer where files are local."""
        folder = Path(self.path)
        weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) if folder.is_dir() else []
        return {
            "name": self.name,
            "architecture": self.architecture,
            "layers": self.layers,
            "context_length": self.context_length,
            "weights_sha256": {p.name: journal.sha256(p) for p in weights} or None,
            "tokenizer_sha256": journal.sha256(tokenizer)
            if (tokenizer := folder / "tokenizer.json").exists()
            else None,
        }


def model_folder(name: str) -> str:
    """Folder of a model: a built-in one, a fetched one, a local one, or what the hub has. Reads no configuration.

    Raises:
        ConfigError: no such model, it has not been fetched yet, or its folder has no `config.json`.
    """
    if name in FETCHABLE:
        return str(fetched_folder(name))
    path = str(shipped(f"models/{name}/checkpoint")) if name in BUILT_IN_MODELS else name
    looks_local = name.startswith((".", "/", "~")) or Path(path).expanduser().exists()
    if looks_local:
        path = str(Path(path).expanduser())
        if not (Path(path) / "config.json").exists():
            raise ConfigError(
                f"no model at {path}: there is no config.json",
                fix=_NAME_ANOTHER,
            )
    else:
        path = _download(name)
    return path


def resolve_model(name: str) -> Model:
    """Find a model and read its configuration.

    Raises:
        ConfigError: no such model, or its folder has no readable `config.json`.
    """
    path = model_folder(name)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, json.JSONDecodeError) as e:
        first = str(e).splitlines()[0]
        raise ConfigError(
            f"cannot read the configuration of model `{name}`: {first}",
            fix=_NAME_ANOTHER,
        ) from e
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    return Model(
        name=name,
        path=path,
        layers=int(text.num_hidden_layers),
        context_length=int(getattr(text, "max_position_embeddings", 1 << 30)),
        architecture=(config.architectures or [type(config).__name__])[0],
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or int(text.hidden_size) // heads),
        config=json.loads(text.to_json_string(use_diff=False)),
    )


def _download(name: str) -> str:
    """Folder of a hub model, fetched if need be: weights that lie in a folder can be hashed and checked against."""
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except Exception as e:  # the hub's client raises many kinds: no such model, no access, no network; or is missing
        first = (str(e).splitlines() or [type(e).__name__])[0]
        near = difflib.get_close_matches(name, (*BUILT_IN_MODELS, *FETCHABLE), n=1, cutoff=0.7)
        raise ConfigError(
            f"`{name}` is no built-in model and no folder, and it cannot be got from the hub: {first}",
            fix=f"did you mean `{near[0]}`?" if near else _NAME_ANOTHER,
        ) from e
