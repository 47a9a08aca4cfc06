"""bf16 products in fp32: the correctly rounded value as often as PyTorch's own, on any CPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from sglang_probe import bf16
from sglang_probe.errors import ConfigError

SHAPES = [(768, 256), (256, 704), (960, 576), (576, 1536)]
"""Outputs and inputs of layers of probe-text and SmolLM2-135M."""


def _exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The correctly rounded product: float64 holds these sums to far more than bf16's 8 bits."""
    return linear(x.double(), weight.double()).to(torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 32, 257, 1024])
def test_a_product_is_the_rounded_one_or_its_neighbour(rows: int, shape: tuple[int, int]) -> None:
    """Where fp32 sums differ from the exact ones by less than their error, rounding may go the other way."""
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, shape[1]).bfloat16(), torch.randn(shape).bfloat16()
    ours, stock, exact = bf16.linear(x, weight), linear(x, weight), _exact(x, weight)
    for product in (ours, stock):
        other = product != exact
        assert other.float().mean() < 2e-3
        # At most one spacing of bf16 at the size of the sum's largest partial result.
        error = (product.double() - exact.double()).abs()[other]
        assert (error <= 2.0**-7 * exact.double().abs()[other] + 1e-3).all()
    assert (ours == stock).float().mean() > 0.998


def test_a_bias_is_added_before_rounding() -> None:
    x, weight = torch.ones(1, 1).bfloat16(), torch.full((1, 1), 256.0).bfloat16()
    half = torch.full((1,), 1.0).bfloat16()
    assert bf16.linear(x, weight, half).item() == 256.0  # 257 lies between 256 and 258
    assert bf16.linear(x * 1.0078125, weight, half).item() == 260.0  # 258 + 1; rounded before, 258 would stay


def test_weights_that_change_in_place_are_read_anew() -> None:
    """As `update_weights_from_disk` does it: through `.data`, which no version counter sees."""
    x, weight = torch.ones(2, 2).bfloat16(), torch.nn.Parameter(torch.ones(3, 2).bfloat16(), requires_grad=False)
    assert bf16.linear(x, weight).tolist() == [[2.0, 2.0, 2.0]] * 2
    weight.data.copy_(torch.full((3, 2), 2.0))
    assert bf16.linear(x, weight).tolist() == [[4.0, 4.0, 4.0]] * 2


def test_memory_is_shared_between_weights_of_any_size_and_between_modes() -> None:
    x = torch.ones(2, 4).bfloat16()
    with torch.inference_mode():
        small = bf16.linear(x, torch.ones(2, 4).bfloat16())
    large = bf16.linear(x, torch.full((64, 4), 2.0).bfloat16())
    again = bf16.linear(x, torch.ones(2, 4).bfloat16())
    assert small.tolist() == again.tolist() == [[4.0, 4.0]] * 2
    assert large.tolist() == [[8.0] * 64] * 2


@pytest.mark.parametrize("mask", [None, "bool", "bias"])
def test_attention_differs_by_rounding_alone(mask: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 16, 8).bfloat16()
    seen = torch.ones(16, 16, dtype=torch.bool).tril()
    options = {
        None: {"is_causal": True},
        "bool": {"attn_mask": seen},
        "bias": {"attn_mask": torch.zeros(16, 16).masked_fill(~seen, -torch.inf).bfloat16()},
    }[mask]
    monkeypatch.setenv(bf16.VARIABLE, "fp32")
    wide = bf16.attention(q, k, v, **options)
    assert wide.dtype == torch.bfloat16
    torch.testing.assert_close(wide, scaled_dot_product_attention(q, k, v, **options), atol=2e-2, rtol=2e-2)
    assert torch.equal(wide, _fp32_attention(q, k, v, seen).bfloat16())
    monkeypatch.setenv(bf16.VARIABLE, "bf16")
    assert torch.equal(bf16.attention(q, k, v, **options), scaled_dot_product_attention(q, k, v, **options))


def _fp32_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(*(t.float() for t in (q, k, v)), attn_mask=seen)


def test_the_choice_is_the_users_and_otherwise_onednns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bf16.VARIABLE, "fp32")
    assert bf16.products() == "fp32"
    monkeypatch.setenv(bf16.VARIABLE, "bf16")
    assert bf16.products() == "bf16"
    monkeypatch.delenv(bf16.VARIABLE)
    for able, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(bf16, "_has_kernels", lambda able=able: able)
        assert bf16.products() == expected
    monkeypatch.setenv(bf16.VARIABLE, "fp16")
    with pytest.raises(ConfigError, match="auto, bf16 or fp32"):
        bf16.products()


def test_a_model_is_widened_where_it_has_bf16_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64)).bfloat16()
    wide_only = torch.nn.Linear(64, 64)
    x = torch.randn(5, 64).bfloat16()
    calls: list[torch.Size] = []
    real = bf16.linear
    monkeypatch.setattr(bf16, "linear", lambda *args: calls.append(args[1].shape) or real(*args))
    monkeypatch.setenv(bf16.VARIABLE, "bf16")
    bf16.widen(model)
    model(x)
    assert calls == []
    monkeypatch.setenv(bf16.VARIABLE, "fp32")
    for module in (model, wide_only):
        bf16.widen(module)
    seen = partial(model[2].register_forward_hook, lambda _m, _args, out: calls.append(out.shape))
    seen()
    out = model(x)
    wide_only(x.float())
    assert calls == [torch.Size([64, 64]), torch.Size([64, 64]), torch.Size([5, 64])]
    assert out.dtype == torch.bfloat16
