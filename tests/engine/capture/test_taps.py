"""Taps copy what they see, and notice what they did not see."""

from __future__ import annotations

import pytest
import torch

from sglang_probe.engine.capture.taps import Taps
from sglang_probe.errors import LedgerError


def test_rows_survive_the_next_forward(  # the buffer is reused, and fused kernels overwrite what was passed in
) -> None:
    taps = Taps(["h"], capacity=4)
    x = torch.ones(2, 3)
    taps.arm()
    taps.write("h", x)
    rows = taps.take(2, replayed=False)["h"]
    x.fill_(7)
    taps.write("h", x)
    assert rows.tolist() == [[1.0] * 3] * 2


def test_a_tap_that_did_not_fire_is_noticed() -> None:
    taps = Taps(["h"], capacity=4)
    taps.write("h", torch.ones(2, 3))
    taps.arm()
    with pytest.raises(LedgerError, match="saw 0 rows in a forward of 2 tokens"):
        taps.take(2, replayed=False)


def test_another_number_of_rows_than_tokens_is_noticed() -> None:
    taps = Taps(["h"], capacity=4)
    taps.write("h", torch.ones(3, 3))
    with pytest.raises(LedgerError, match="saw 3 rows in a forward of 2 tokens"):
        taps.take(2, replayed=False)


def test_at_replay_padding_behind_the_batch_stays_behind() -> None:
    """Python does not run at replay; the recorded copy writes the padded batch into the same buffer."""
    taps = Taps(["h"], capacity=4)
    taps.write("h", torch.zeros(4, 3))
    taps.arm()
    buffer = taps["h"].buffer
    assert buffer is not None
    buffer.copy_(torch.arange(12.0).view(4, 3))
    assert taps.take(3, replayed=True)["h"].tolist() == torch.arange(9.0).view(3, 3).tolist()


def test_a_larger_forward_grows_the_buffer() -> None:
    taps = Taps(["h"], capacity=2)
    taps.write("h", torch.ones(1, 3))
    taps.write("h", torch.ones(9, 3))
    assert taps.take(9, replayed=False)["h"].shape == (9, 3)


def test_a_tap_of_scores_writes_them_in_place_of_rows() -> None:
    w = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    taps = Taps(["row", "scores"], capacity=2, weights={"scores": w})
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)  # more than its capacity
    for name in ("row", "scores"):
        taps.write(name, x)
    rows = taps.take(3, replayed=False)
    assert torch.equal(rows["row"], x)
    torch.testing.assert_close(rows["scores"], x.float() @ w, rtol=1e-6, atol=1e-6)
