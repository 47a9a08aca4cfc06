"""Which layer a rotation belongs to, when all layers share the rotary module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sglang_probe.engine.capture.taps import Taps
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import attention_rows as attention
from sglang_probe.engine.hooks.session import Session
from sglang_probe.errors import LedgerError, UnsupportedError
from sglang_probe.run.hook_points import ATTENTION, parse_hook_point
from tests.engine.made_session import make_session


class Rotary(nn.Module):
    """Rotates in place, as CUDA kernels do; here by adding the positions."""

    def forward(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q.add_(positions[:, None]), k.add_(positions[:, None])


class Core(nn.Module):
    v_head_dim = head_dim = 2

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        return q + k + v


class Attention(nn.Module):
    def __init__(self, rotary: Rotary, value: float, *, rotates: bool = True) -> None:
        super().__init__()
        self.rotary_emb, self.attn, self.value, self.rotates = rotary, Core(), value, rotates

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.full((len(positions), 4), self.value * scale) for scale in (1, 10, 100))
        if self.rotates:
            q, k = self.rotary_emb(positions, q, k)
        out: torch.Tensor = self.attn(q, k, v, None)
        return out


class Layer(nn.Module):
    def __init__(self, self_attn: Attention) -> None:
        super().__init__()
        self.self_attn = self_attn


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Session:
    """A session that believes that it records; the modules above are no SGLang, so that the type check is left out."""
    monkeypatch.setattr(attention, "check_attention", lambda *_: None)
    return make_session(monkeypatch, EngineProbeConfig(run=tmp_path))


def _install(running: Session, layers: list[Layer], names: list[str]) -> Taps:
    taps = Taps(names, capacity=4)
    attention.install_attention_taps(layers, [parse_hook_point(n) for n in names], taps.write)
    taps.arm()
    return taps


def test_each_layer_gets_its_own_rows_from_before_a_rotation_in_place(recording: Session) -> None:
    rotary = Rotary()
    layers = [Layer(Attention(rotary, float(i + 1))) for i in range(3)]
    names = [f"blocks.{i}.{site}" for i in (0, 2) for site in ATTENTION]
    taps = _install(recording, layers, names)
    for layer in layers:
        layer.self_attn(torch.tensor([5.0, 6.0]))
    rows = {h: x[:, 0].tolist() for h, x in taps.take(2, replayed=False).items()}
    assert rows == {
        f"blocks.{i}.{site}": values
        for i, x in ((0, 1.0), (2, 3.0))
        for site, values in {
            "attn.hook_q": [x, x],
            "attn.hook_rot_q": [x + 5, x + 6],
            "attn.hook_k": [10 * x, 10 * x],
            "attn.hook_rot_k": [10 * x + 5, 10 * x + 6],
            "attn.hook_v": [100 * x, 100 * x],
        }.items()
    }


def test_a_layer_that_does_not_rotate_does_not_get_the_next_ones_rows(recording: Session) -> None:
    """A fused kernel may leave the rotary module out; the layer behind it calls it and is not captured."""
    rotary = Rotary()
    layers = [Layer(Attention(rotary, 1.0, rotates=False)), Layer(Attention(rotary, 2.0))]
    taps = _install(recording, layers, ["blocks.0.attn.hook_q"])
    for layer in layers:
        layer.self_attn(torch.tensor([5.0]))
    with pytest.raises(LedgerError, match=r"blocks\.0\.attn\.hook_q saw 0 rows"):
        taps.take(1, replayed=False)


@pytest.mark.parametrize("flag", attention.FUSED_ROTATIONS)
def test_rows_from_before_a_fused_rotation_are_refused(recording: Session, flag: str) -> None:
    layer = Layer(Attention(Rotary(), 1.0, rotates=False))
    setattr(layer.self_attn, flag, True)
    for site in ("hook_q", "hook_k"):
        with pytest.raises(UnsupportedError, match=rf"`blocks\.0\.attn\.{site}` is not there in layer 0.*`{flag}`"):
            attention.install_attention_taps([layer], [parse_hook_point(f"blocks.0.attn.{site}")], print)
    taps = _install(recording, [layer], ["blocks.0.attn.hook_rot_q"])  # this one does
    layer.self_attn(torch.tensor([5.0]))
    assert taps.take(1, replayed=False)["blocks.0.attn.hook_rot_q"].shape == (1, 4)


def test_keys_that_attention_is_not_handed_stop_the_recording(recording: Session) -> None:
    """SGLang's fused decode on ROCm stores keys and values itself and calls attention with queries alone."""
    layer = Layer(Attention(Rotary(), 1.0))
    _install(recording, [layer], ["blocks.0.attn.hook_rot_k"])
    with pytest.raises(TypeError):  # of this test's Core, behind the tap
        layer.self_attn.attn(torch.ones(1, 4), None, None, None)
    assert recording.fault is not None
    assert "hands no such tensor to attention" in recording.fault


def test_another_kind_of_attention_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="layer 0 has Core after Rotary"):
        attention.install_attention_taps(
            [Layer(Attention(Rotary(), 1.0))], [parse_hook_point("blocks.0.attn.hook_q")], print
        )
