"""SAEs on disk: folders of SAELens (`cfg.json`, `sae_weights.safetensors`) and of Gemma Scope (`params.npz`,
`params.safetensors`). Read with torch, safetensors and json alone.

`SAE.load_from_disk` of SAELens opens what `write_sae` writes; a test compares the two readers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.errors import ConfigError
from sglang_probe.run import journal
from sglang_probe.sae.sae import ARCHITECTURES, NORMALIZE, SAE

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMAT = "6.54.12"
"""Version of SAELens whose folders these are."""
GEMMA_SCOPE = ("params.npz", "params.safetensors")
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")


def read_sae(folder: str | Path, *, dtype: torch.dtype | None = None, hook_point: str | None = None) -> SAE:
    """Read an SAE.

    Args:
        dtype: of the weights and of all that is computed with them; by default float32, whatever is stored.
        hook_point: where its rows come from, for folders that do not say.

    Raises:
        ConfigError: there is none, it is damaged, or it is of a kind whose latents would be computed wrongly; says
            which. Also if `hook_point` contradicts the folder.
    """
    import torch

    folder = Path(folder)
    if (folder / CONFIG).is_file():
        sae = _read_sae_lens(folder)
    elif gemma := next((folder / n for n in GEMMA_SCOPE if (folder / n).is_file()), None):
        sae = _read_gemma_scope(gemma)
    else:
        wanted = f"`{CONFIG}` with `{WEIGHTS}`, or {' or '.join(f'`{n}`' for n in GEMMA_SCOPE)}"
        raise ConfigError(f"{folder} holds no SAE: no {wanted}", fix="give the folder that SAELens or we wrote")
    if hook_point is not None and sae.hook_point not in (None, hook_point):
        raise ConfigError(f"{folder} is of `{sae.hook_point}`, not of `{hook_point}`")
    metadata = dict(sae.metadata) | ({} if hook_point is None else {"hook_name": hook_point})
    held = {n: getattr(sae, n) for n in (*_TENSORS, "threshold")}
    kinds: dict[str, Any] = {n: None if t is None else t.to(dtype or torch.float32) for n, t in held.items()}
    return replace(sae, **kinds, metadata=metadata)


def write_sae(sae: SAE, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the SAE as SAELens has it; a reader sees the old folder's files or the new ones, each whole.

    Args:
        dtype: of the matrices on disk, e.g. `torch.bfloat16`: half the size. Biases and thresholds keep theirs: they
            are small, and a rounded threshold changes which latents fire. Readers compute in float32 either way.
    """
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    stored = {n: t.to(dtype) if dtype is not None and t.ndim == 2 else t for n, t in tensors.items()}
    # Copies, because encoder and decoder may share memory (tied weights), which safetensors refuses.
    stored = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in stored.items()}
    config: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_in": sae.width,
        "d_sae": sae.latents,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": sae.normalize,
        "reshape_activations": "none",
        # Without a version SAELens takes the folder for one of before 6.0, and drops what it does not know of them.
        "metadata": {"sae_lens_version": FORMAT, **sae.metadata},
    }
    if sae.architecture == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": sae.rescale_by_decoder_norm}
    folder.mkdir(parents=True, exist_ok=True)
    journal.write_durably(folder / WEIGHTS, lambda path: save_file(stored, path))
    journal.write_text_durably(folder / CONFIG, json.dumps(config, indent=1, allow_nan=False) + "\n")


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the file that holds the weights: the identity of an SAE.

    Raises:
        ConfigError: the folder holds no SAE.
    """
    for name in (WEIGHTS, *GEMMA_SCOPE):
        if (folder / name).is_file():
            return journal.sha256(folder / name)
    raise ConfigError(f"{folder} holds no SAE")


def _read_sae_lens(folder: Path) -> SAE:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from e
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ConfigError(f"{path} does not say which `architecture` the SAE has")
    _refuse_unreadable(path, config)
    tensors = _load(folder / WEIGHTS)
    return SAE(
        architecture=config["architecture"],
        **_named(folder / WEIGHTS, tensors, threshold=config["architecture"] == "jumprelu"),
        k=config.get("k") if config["architecture"] == "topk" else None,
        apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
        rescale_by_decoder_norm=config["architecture"] == "topk" and bool(config.get("rescale_acts_by_decoder_norm")),
        normalize=_normalize(config),
        metadata=config.get("metadata") or _old_metadata(config),
    )


def _refuse_unreadable(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what would be read and computed wrongly.

    Raises:
        ConfigError: says why.
    """
    architecture, normalize = config["architecture"], _normalize(config)
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation != "relu" or config.get("finetuning_scaling_factor"):
        what = f"`{activation}` as activation" if activation != "relu" else "a scaling factor after finetuning"
        raise ConfigError(
            f"{path} is of an old SAELens, and has {what}",
            fix="load it with SAELens, and save it with `save_inference_model`",
        )
    if architecture == "batchtopk" or normalize == "expected_average_only_in":
        # SAELens folds the scale of its training into the weights at the end only; `load_from_disk` reads such a
        # folder without a word, and every reconstruction of raw rows is wrong.
        raise ConfigError(
            f"{path} is a checkpoint in the middle of a training: its weights expect scaled rows",
            fix="finish the training; or load it with SAELens, fold the factor of its `activation_scaler.json` "
            "(`fold_activation_norm_scaling_factor`), and save it with `save_inference_model`",
        )
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"{path}: architecture `{architecture}` cannot be read", fix=f"one of {ARCHITECTURES}")
    if normalize not in NORMALIZE:
        raise ConfigError(f"{path}: `normalize_activations: {normalize}` cannot be used", fix=f"one of {NORMALIZE}")


def _normalize(config: Mapping[str, Any]) -> Any:
    """`normalize_activations`; a boolean in folders of before SAELens 6."""
    given = config.get("normalize_activations")
    return {True: "expected_average_only_in", False: "none", None: "none"}.get(given, given)


def _old_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """What folders of before SAELens 6 say outside of `metadata`."""
    names = {"hook_name": "hook_name", "hook_point": "hook_name", "model_name": "model_name"}
    return {new: config[old] for old, new in names.items() if config.get(old)}


def _read_gemma_scope(path: Path) -> SAE:
    """A JumpReLU SAE of Gemma Scope (2408.05147): the bias of its decoder is not taken off the input."""
    import numpy as np
    import torch

    if path.suffix == ".npz":
        try:
            with np.load(path) as data:
                tensors = {name: torch.from_numpy(data[name]) for name in data.files}
        except (OSError, ValueError) as e:
            raise ConfigError(f"{path} cannot be read: {e}") from e
    else:
        tensors = _load(path)
    tensors = {f"W_{n[2:]}" if n.startswith("w_") else n: t for n, t in tensors.items()}
    return SAE("jumprelu", **_named(path, tensors, threshold=True), apply_b_dec_to_input=False)


def _load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from e


def _named(path: Path, tensors: Mapping[str, torch.Tensor], *, threshold: bool) -> dict[str, Any]:
    names = [*_TENSORS, *(["threshold"] if threshold else [])]
    if absent := [n for n in names if n not in tensors]:
        raise ConfigError(f"{path} has no `{absent[0]}`; it holds {', '.join(sorted(tensors)) or 'nothing'}")
    if further := sorted(tensors.keys() - set(names)):
        # A scaling factor, a gate, the skip connection of a transcoder: without it every reconstruction is wrong.
        raise ConfigError(f"{path} holds `{further[0]}`, which SAEs of this kind do not have")
    return {n: tensors[n] for n in names}
