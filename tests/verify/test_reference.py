"""How far a row may be from what `transformers` computes."""

from __future__ import annotations

import pytest
import torch

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
