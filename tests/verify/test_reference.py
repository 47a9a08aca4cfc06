"""How far a row may be from what `transformers` computes."""

from __future__ import annotations

import pytest
import torch

from sglang_probe.verify import rounding
from sglang_probe.verify.reference import TOLERANCE, tolerance


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_rounding_may_grow_with_the_root_of_the_depth_and_no_further(dtype: torch.dtype) -> None:
    base = TOLERANCE[dtype]
    for point in ("hook_embed", "blocks.0.hook_resid_post", "blocks.3.hook_resid_post", "blocks.3.attn.hook_q"):
        assert tolerance(point, dtype) == base
    assert tolerance("blocks.15.hook_resid_post", dtype) == pytest.approx(2 * base)
    assert tolerance("blocks.63.hook_resid_post", dtype) == pytest.approx(4 * base)


def test_after_a_hundred_layers_a_row_of_another_token_still_fails() -> None:
    """Two unrelated rows differ by about 1.4 times their length."""
    assert max(tolerance("blocks.99.hook_resid_post", dtype) for dtype in TOLERANCE) < 0.3


class Amplifier(torch.nn.Module):
    """A model of one layer, whose output is what an embedding differs from 1 by, a thousand times."""

    def __init__(self) -> None:
        super().__init__()

        class Layer(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return (x - 1) * 1000

        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Identity()
        self.model.layers = torch.nn.ModuleList([Layer()])

    def rows(self) -> dict[str, torch.Tensor]:
        x = torch.full((2, 64), 3.0, dtype=torch.bfloat16)
        x[1] = 1 + 2**-7  # the next number after 1: rounding decides what is left of it
        return {"blocks.0.hook_resid_post": self.model.layers[0](self.model.embed_tokens(x))}


def test_rows_that_rounding_decides_are_told_from_the_others() -> None:
    model = Amplifier()
    plain = model.rows()
    steady, decided = rounding.spread(model, model.rows)["blocks.0.hook_resid_post"]
    assert 0 < steady < 0.02
    assert decided > 0.5
    after = model.rows()  # the model is as it was
    assert torch.equal(after["blocks.0.hook_resid_post"], plain["blocks.0.hook_resid_post"])
