"""Rows of every reviewed architecture against `transformers`, on tiny models with random weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_probe.engine.releases import release
from sglang_probe.run.hook_points import ATTENTION, REVIEWED_ARCHITECTURES
from sglang_probe.run.run import load_run
from sglang_probe.stats.distance import row_distance
from sglang_probe.verify.reference import reference_errors
from sglang_probe.verify.verify import verify
from tests.attack.latent import make_latent
from tests.attack.tokenizer import give_tokenizer
from tests.attack.windowed import make_windowed

pytestmark = pytest.mark.engine

CASES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "MistralForCausalLM": "mistral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
}

_OPTIONS = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}


def make_model(folder: Path, kind: str) -> Path:
    """A model of 3 layers and width 64 with random weights, and the tokenizer of `probe-text`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options: dict[str, Any] = _OPTIONS.get(kind, {})
    config = AutoConfig.for_model(
        kind,
        vocab_size=3072,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **options,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    give_tokenizer(folder)
    return roughened(folder)


def roughened(folder: Path) -> Path:
    """The model with noise on every weight: norms of one and biases of zero would hide a wrong tensor, and layers of
    small weights that of the layer before."""
    path = folder / "model.safetensors"
    torch.manual_seed(0)
    noisy = {name: w + torch.randn_like(w) * 0.1 for name, w in load_file(path).items()}
    save_file(noisy, path, metadata={"format": "pt"})
    return folder


def test_every_reviewed_architecture_is_compared_here() -> None:
    assert {*CASES, "LlamaForCausalLM"} == set(REVIEWED_ARCHITECTURES)  # Llama: tests/end_to_end/test_harvest.py


@pytest.mark.parametrize(
    "architecture", ["Qwen3ForCausalLM", *(pytest.param(a, marks=pytest.mark.slow) for a in list(CASES)[1:])]
)
def test_fp32_rows_agree_with_transformers(
    architecture: str, cli: Callable, write_yaml: Callable, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", CASES[architecture])
    hook_points = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(3))]
    hook_points += [f"blocks.{i}.{site}" for i in (0, 2) for site in ATTENTION]
    config = write_yaml(
        "model",
        model=str(model),
        dtype="float32",
        hook_points=hook_points,
        arm={"cache": "off"},
        workload={"families": 1, "requests_per_family": 3, "exemplars": 1},
    )
    done = cli("harvest", config, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run(tmp_path / "run")
    assert run.manifest["model"]["architecture"] == architecture
    assert all(c.holds for c in verify(run))
    errors = reference_errors(run, str(model), requests=3)
    assert max(float(e.max()) for e in errors.values()) < 1e-4


RESIDUAL_ALONE = {"DeepseekV3ForCausalLM": make_latent, "MellumForCausalLM": make_windowed}


def test_every_architecture_of_the_residual_stream_alone_is_compared_here() -> None:
    assert release().residual_of <= set(RESIDUAL_ALONE)


@pytest.mark.parametrize(
    "architecture", ["DeepseekV3ForCausalLM", pytest.param("MellumForCausalLM", marks=pytest.mark.slow)]
)
def test_the_residual_stream_agrees_with_transformers(
    architecture: str, cli: Callable, write_yaml: Callable, tmp_path: Path
) -> None:
    """In prompts in chunks, behind reused prefixes, in decode steps and in batches of both."""
    if architecture not in release().residual_of:
        pytest.skip("not reviewed on this release")
    model = roughened(RESIDUAL_ALONE[architecture](tmp_path / "model"))
    config = write_yaml(
        "model",
        model=str(model),
        dtype="float32",
        hook_points=["hook_embed", "blocks.*.hook_resid_post"],
        arm={"cache": "on"},
        concurrency=3,
        server={"chunked_prefill_size": 64, "enable_mixed_chunk": True},
        sampling={"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
        workload={"families": 2, "requests_per_family": 4, "exemplars": 1},
    )
    done = cli("harvest", config, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run(tmp_path / "run")
    assert all(c.holds for c in verify(run))
    spans = run.spans()
    assert {"computed", "reused"} <= set(spans["status"])
    assert {"prefill", "decode"} <= set(spans["phase"])
    assert spans["chunk"].max() > 0
    assert (run.forwards()["mode"] == "mixed").any()
    errors = reference_errors(run, str(model), requests=8)
    assert set(errors) == set(run.hook_points)
    assert {len(e) for e in errors.values()} == {int((run.tokens()["row"] >= 0).sum())}
    assert max(float(e.max()) for e in errors.values()) < 1e-4
    rows = run.tokens()["row"].to_numpy()
    rows = rows[rows >= 0]
    for before, after in itertools.pairwise(run.hook_points):  # those of another layer would be seen
        assert row_distance(run.rows(before, rows), run.rows(after, rows))[0].min() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_latent, make_windowed])
def test_the_reference_platform_computes_models_of_the_ledger_alone(
    make: Callable[[Path], Path], cli: Callable, write_yaml: Callable, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = make(tmp_path / "model")
    config = write_yaml(
        "model",
        model=str(model),
        dtype="float32",
        hook_points=[],
        arm={"cache": "on"},
        concurrency=1,
        sampling={"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
        workload={"families": 1, "requests_per_family": 3, "exemplars": 1},
    )
    done = cli("harvest", config, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    requests = load_run(tmp_path / "run").requests()
    assert requests["cached_tokens"].sum() > 0
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for request in requests.itertuples():
        ids = torch.tensor([[*request.prompt_ids, *request.output_ids]])
        with torch.no_grad():
            best = reference(ids).logits[0, len(request.prompt_ids) - 1 : -1].argmax(-1)
        assert best.tolist() == list(request.output_ids)
