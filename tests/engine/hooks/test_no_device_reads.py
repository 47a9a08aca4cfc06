"""The watch that tests/end_to_end/test_accelerator.py relies on does see a read, whichever way it is made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_probe.engine.capture.graph_taps import GraphTaps

sys.path.insert(0, str(Path(__file__).parent / "plugin"))

from no_device_reads import HostRead, without_reads

X = torch.arange(4)


@pytest.mark.parametrize(
    "read",
    [
        lambda: X.tolist(),
        lambda: X[0].item(),
        lambda: int(X[0]),
        lambda: bool(X.any()),
        lambda: 3 in X,
        lambda: X.numpy(),
        lambda: np.asarray(X),
        lambda: X.cpu(),
        lambda: X.to("cpu"),
        lambda: X.to(device=torch.device("cpu")),
        lambda: X.nonzero(),
        lambda: X[X > 1],
        lambda: torch.equal(X, X),
        lambda: "yes" if X[1] else "no",
        lambda: range(X[2]),
    ],
)
def test_a_read_raises(read: Callable[[], Any]) -> None:
    read()
    with pytest.raises(HostRead):
        without_reads(read)()


def test_what_a_hot_path_may_do_does_not() -> None:
    taps = GraphTaps({"h": (4, torch.int64)}, capacity=2, device="cpu")

    def work() -> int:
        taps.arm()
        taps.write("h", X[None])
        taps.snapshot(1, replayed=False).send(torch.clone)
        index = torch.tensor([0, 2]).to(X.device, non_blocking=True)
        X.clone()[index] = torch.tensor([5, 6]).to(X.dtype)
        return X.shape[0]

    assert without_reads(work)() == 4
