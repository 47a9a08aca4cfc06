"""SGLang's layers on a CPU without bf16 kernels: which are multiplied in fp32, and what they then compute."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sglang_probe import bf16
from sglang_probe.engine.platform.environment import platform_facts
from sglang_probe.engine.releases import release

pytestmark = pytest.mark.skipif(not release().cpu_widens, reason="this release's platform is not told of the model")


def _layer(kind: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    from sglang.srt.layers.quantization import unquant

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(8, 16, dtype=dtype), requires_grad=False)
    layer.quant_method = getattr(unquant, kind)()
    return layer


def _model(**layers: torch.nn.Module) -> torch.nn.Module:
    model = torch.nn.Module()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def test_linear_layers_and_the_output_head_round_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.logits_processor import should_apply_lm_head_quant_method

    from sglang_probe.engine.platform.linear import widen

    monkeypatch.setenv(bf16.VARIABLE, "fp32")
    torch.manual_seed(0)
    model = _model(proj=_layer("UnquantizedLinearMethod"), embed_tokens=_layer("UnquantizedEmbeddingMethod"))
    assert widen(model) == 2
    x = torch.randn(3, 16).bfloat16()
    for layer in model.children():
        expected = (x.float() @ layer.weight.float().T).bfloat16()
        torch.testing.assert_close(layer.quant_method.apply(layer, x), expected, atol=0, rtol=2**-7)
        assert should_apply_lm_head_quant_method(layer, layer.quant_method)
    into = torch.empty(3, 8).bfloat16()
    model.proj.quant_method.apply_into(model.proj, x, into)
    assert torch.equal(into, model.proj.quant_method.apply(model.proj, x))
    ids = torch.tensor([3, 0])
    assert torch.equal(
        model.embed_tokens.quant_method.embedding(model.embed_tokens, ids), model.embed_tokens.weight[ids]
    )


def test_nothing_changes_where_the_cpu_can_do_it_or_the_model_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_probe.engine.platform.linear import widen

    monkeypatch.setenv(bf16.VARIABLE, "bf16")
    assert widen(_model(proj=_layer("UnquantizedLinearMethod"))) == 0
    monkeypatch.setenv(bf16.VARIABLE, "fp32")
    assert widen(_model(proj=_layer("UnquantizedLinearMethod", torch.float32))) == 0


def test_logits_that_are_asked_for_in_fp32_stay_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_probe.engine.platform.linear import widen

    monkeypatch.setenv(bf16.VARIABLE, "fp32")
    model = _model(embed_tokens=_layer("UnquantizedEmbeddingMethod"), logits_processor=torch.nn.Module())
    model.logits_processor.use_fp32_lm_head = True
    assert widen(model) == 0


def test_the_manifest_says_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_probe.engine.platform import environment

    monkeypatch.setattr(environment, "accelerator_present", lambda: False)
    monkeypatch.setenv(bf16.VARIABLE, "fp32")
    assert platform_facts() == {"device": "cpu", "bf16_products": "fp32"}
    monkeypatch.setattr(environment, "accelerator_present", lambda: True)
    assert platform_facts() == {"device": "accelerator"}


def test_a_server_without_arguments_of_ours_gets_them() -> None:
    from sglang_probe.engine.platform.defaults import WATCHDOG_SECONDS, apply_cpu_defaults, cpu_defaults

    bare = SimpleNamespace(
        max_total_tokens=None, mem_fraction_static=None, attention_backend=None, watchdog_timeout=300
    )
    apply_cpu_defaults(bare)
    assert (
        vars(bare)
        == cpu_defaults()
        == {
            "max_total_tokens": 65536,
            "mem_fraction_static": 0.5,
            "attention_backend": "probe_torch",
            "watchdog_timeout": WATCHDOG_SECONDS,
        }
    )


def test_the_watchdog_waits_longer_for_a_model_that_is_slow_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_probe.engine.platform import defaults

    assert 1e6 < defaults._operations_per_second() < 1e16
    monkeypatch.setattr(defaults, "_operations_per_second", lambda: 1e12)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    assert defaults.watchdog_seconds(tmp_path, {}) == defaults.WATCHDOG_SECONDS
    os.truncate(weights, 10**12)  # sparse: half a trillion parameters
    assert defaults.watchdog_seconds(tmp_path, {}) == 20 * 8192
    assert defaults.watchdog_seconds(tmp_path, {"chunked_prefill_size": 1000}) == 20 * 1000
    assert defaults.watchdog_seconds(tmp_path, {"chunked_prefill_size": 100}) == defaults.WATCHDOG_SECONDS


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"attention_backend": "torch_native"}, {"attention_backend": "torch_native"}),
        ({"decode_attention_backend": "torch_native"}, {"attention_backend": None}),
        ({"max_total_tokens": 100}, {"max_total_tokens": 100, "mem_fraction_static": 0.5}),
        ({"mem_fraction_static": 0.2}, {"max_total_tokens": None, "mem_fraction_static": 0.2}),
        ({"watchdog_timeout": 20}, {"watchdog_timeout": 20}),
    ],
)
def test_what_the_user_gave_stays(given: dict[str, object], left: dict[str, object]) -> None:
    from sglang_probe.engine.platform.defaults import apply_cpu_defaults

    names = ("max_total_tokens", "mem_fraction_static", "attention_backend", "watchdog_timeout")
    server = SimpleNamespace(**{**dict.fromkeys(names), **given})
    apply_cpu_defaults(server)
    assert {name: getattr(server, name) for name in left} == left


def test_sglangs_own_resolution_takes_them() -> None:
    """SGLang writes `intel_amx` for every CPU before it asks the platform; that is not the user's word."""
    from sglang.srt.arg_groups.overrides import resolution_result
    from sglang.srt.arg_groups.pipeline import run_resolution_pipeline
    from sglang.srt.server_args import ServerArgs

    from sglang_probe.engine.platform.defaults import cpu_defaults
    from sglang_probe.paths import shipped

    for given in ({}, {"attention_backend": "torch_native", "max_total_tokens": 100}):
        server = ServerArgs(model_path=str(shipped("models/probe-text/checkpoint")), **given)
        run_resolution_pipeline(server)
        expected = {**cpu_defaults(), **given}
        assert {name: resolution_result(server, name) for name in expected} == expected
