"""SAEs on disk: what is written is read, by us and by SAELens, and what would be read wrongly is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_probe.errors import ConfigError
from sglang_probe.sae.folder import CONFIG, WEIGHTS, read_sae, weights_sha256, write_sae
from tests.sae.lens import needs_sae_lens
from tests.sae.small import hand_made, random_sae, rows

ARCHITECTURES = ("standard", "jumprelu", "topk")


def change(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | keys))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_is_read_again(tmp_path: Path, architecture: str) -> None:
    sae = random_sae(architecture, metadata={"hook_name": "blocks.1.hook_resid_post", "ours": {"rows": 3}})
    write_sae(sae, tmp_path)
    again = read_sae(tmp_path)
    x = rows()
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again.reconstruct(x), sae.reconstruct(x))
    assert again.hook_point == "blocks.1.hook_resid_post"
    assert again.metadata["ours"] == {"rows": 3}


def test_matrices_in_half_the_size_leave_the_threshold_as_it_is(tmp_path: Path) -> None:
    sae = random_sae("jumprelu")
    write_sae(sae, tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored["W_enc"].dtype == torch.bfloat16
    again = read_sae(tmp_path)
    assert again.W_enc.dtype == torch.float32
    assert torch.equal(again.W_enc, sae.W_enc.bfloat16().float())
    assert torch.equal(again.threshold, sae.threshold)


def test_the_identity_of_an_sae_is_its_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_sae(random_sae("standard", seed=seed).with_metadata(made=name), tmp_path / name)
    a, b, c = (weights_sha256(tmp_path / n) for n in "abc")
    assert a == b != c


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_folder_of_gemma_scope(tmp_path: Path, kind: str) -> None:
    sae = hand_made("jumprelu", apply_b_dec_to_input=False)
    tensors = {n: getattr(sae, n) for n in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    if kind == "npz":
        np.savez(tmp_path / "params.npz", **{n: t.numpy() for n, t in tensors.items()})
    else:
        lower = {n.replace("W_", "w_"): t.contiguous() for n, t in tensors.items()}
        save_file(lower, tmp_path / "params.safetensors")
    read = read_sae(tmp_path, hook_point="blocks.20.hook_resid_post")
    x = torch.tensor([[3.0, 1.0]])
    assert read.encode(x).tolist() == [[3.0, 1.5, 0.0]]
    assert read.hook_point == "blocks.20.hook_resid_post"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"normalize_activations": "expected_average_only_in"}, "in the middle of a training"),
        ({"architecture": "batchtopk"}, "in the middle of a training"),
        ({"architecture": "gated"}, "`gated` cannot be read"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"activation_fn_str": "topk"}, "old SAELens"),
        ({"finetuning_scaling_factor": True}, "scaling factor"),
        ({"architecture": None}, "which `architecture`"),
        ({"architecture": "jumprelu"}, "no `threshold`"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    write_sae(hand_made(), tmp_path)
    change(tmp_path, **keys)
    with pytest.raises(ConfigError, match=said):
        read_sae(tmp_path)


def test_a_folder_of_before_saelens_6(tmp_path: Path) -> None:
    write_sae(hand_made(), tmp_path)
    old = {"metadata": None, "hook_point": "blocks.3.hook_resid_post", "normalize_activations": False}
    change(tmp_path, **old, activation_fn_str="relu")
    assert read_sae(tmp_path).hook_point == "blocks.3.hook_resid_post"
    change(tmp_path, normalize_activations=True)
    with pytest.raises(ConfigError, match="in the middle of a training"):
        read_sae(tmp_path)


def test_a_tensor_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    write_sae(hand_made(), tmp_path)
    save_file({**load_file(tmp_path / WEIGHTS), "W_skip": torch.zeros(2, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match="`W_skip`"):
        read_sae(tmp_path)


def test_damage_and_absence_are_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no SAE"):
        read_sae(tmp_path)
    write_sae(hand_made(), tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_sae(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_sae(tmp_path)


def test_a_hook_point_that_contradicts_the_folder_is_refused(tmp_path: Path) -> None:
    write_sae(hand_made(metadata={"hook_name": "blocks.1.hook_resid_post"}), tmp_path)
    with pytest.raises(ConfigError, match=r"blocks\.1\.hook_resid_post"):
        read_sae(tmp_path, hook_point="blocks.2.hook_resid_post")


@needs_sae_lens
@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_reader_and_that_of_sae_lens_compute_the_same(tmp_path: Path, architecture: str, normalize: Any) -> None:
    from sae_lens import SAE as Theirs

    metadata = {"hook_name": "blocks.1.hook_resid_post", "ours": {"rows": 3}}
    write_sae(random_sae(architecture, normalize=normalize, metadata=metadata), tmp_path)
    ours, theirs = read_sae(tmp_path), Theirs.load_from_disk(tmp_path)
    x = rows()
    with torch.no_grad():
        z = theirs.encode(x)
        made = theirs.decode(z)
    assert torch.equal(ours.encode(x) > 0, z > 0)
    # The same operations in the same order; products of contiguous and of other matrices differ in the last bit.
    torch.testing.assert_close(ours.encode(x), z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.reconstruct(x), made, rtol=1e-6, atol=1e-5)
    assert "ours" in theirs.cfg.metadata  # by `in`: an attribute that is not there reads as None
    assert theirs.cfg.metadata.hook_name == ours.hook_point
