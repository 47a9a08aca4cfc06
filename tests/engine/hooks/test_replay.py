"""The hooks of a model in a graph: captured before the recording opens, replayed without them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.hooks import model as engine_model
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import accelerator
from sglang_probe.engine.hooks.instruments import attention_rows as attention
from sglang_probe.engine.hooks.instruments.rows import Rows, install_taps
from sglang_probe.engine.hooks.session import Session
from sglang_probe.engine.ledger.facts import ForwardPlan
from sglang_probe.engine.releases import release
from sglang_probe.errors import LedgerError
from sglang_probe.run.hook_points import ATTENTION
from tests.engine.capture.graph import WIDTH, Graph
from tests.engine.made_session import make_session, set_taps

LAYERS = (0, 1)
POINTS = ["hook_embed", *(f"blocks.{i}.{s}" for i in LAYERS for s in ("hook_resid_post", *ATTENTION))]


class Rotary(nn.Module):
    """In place, as on CUDA."""

    def forward(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q.add_(positions[:, None]), k.mul_(2)


class Core(nn.Module):
    v_head_dim = head_dim = WIDTH

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _forward_batch: Any) -> torch.Tensor:
        return q + k * v


class Attention(nn.Module):
    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.rotary_emb, self.attn = rotary, Core()

    def forward(self, positions: torch.Tensor, x: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        q, k, v = (x.repeat(1, 3) + 1).split(WIDTH, dim=-1)  # views of one tensor, as of SGLang's projection
        q, k = self.rotary_emb(positions, q, k)
        out: torch.Tensor = self.attn(q, k, v, forward_batch)
        return out


class Layer(nn.Module):
    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.self_attn = Attention(rotary)

    def forward(self, positions: torch.Tensor, x: torch.Tensor, forward_batch: Any) -> Any:
        x = x + self.self_attn(positions, x, forward_batch)
        if forward_batch.residual_stream is None:  # 0.5.17: the stream is the sum of what a layer returns
            return torch.zeros_like(x), x
        return forward_batch.residual_stream.write(x)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        rotary = Rotary()
        self.embed_tokens = nn.Identity()
        self.layers = nn.ModuleList(Layer(rotary) for _ in LAYERS)


class LlamaForCausalLM(nn.Module):
    """By its name only; layers, attention and SGLang's residual stream are where SGLang has them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = SimpleNamespace(residual_stream=_residual_stream(), forward_mode=None)
        positions = torch.arange(len(x), dtype=x.dtype)
        hidden = self.model.embed_tokens(x)
        for layer in self.model.layers:
            out = layer(positions, hidden, batch)
            hidden = sum(out) if isinstance(out, tuple) else out
        return hidden


def _residual_stream() -> Any:
    if release().version == "0.5.17":
        return None
    from sglang.srt.layers.layer_boundary.residual.stream import ResidualStream

    return ResidualStream()


def expected(x: torch.Tensor) -> dict[str, torch.Tensor]:
    positions = torch.arange(len(x), dtype=x.dtype)[:, None]
    found = {"hook_embed": x}
    for i in LAYERS:
        q = x + 1
        x = x + (q + positions) + 2 * q * q
        values = (q, q + positions, q, 2 * q, q)
        named = zip(("hook_q", "hook_rot_q", "hook_k", "hook_rot_k", "hook_v"), values, strict=True)
        found |= {f"blocks.{i}.attn.{site}": value for site, value in named}
        found[f"blocks.{i}.hook_resid_post"] = x
    return found


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Session:
    """An engine whose model is loaded and whose recording has not been opened."""
    monkeypatch.setattr(attention, "check_attention", lambda *_: None)  # no SGLang modules
    config = EngineProbeConfig(run=tmp_path, hook_points=POINTS, simulated_graphs=True)
    running = make_session(monkeypatch, config, Rows, opened=False)
    set_taps(running, GraphTaps(dict.fromkeys(POINTS, (WIDTH, torch.float32)), capacity=8, device="cpu"))
    return running


def _install(running: Session, model: LlamaForCausalLM) -> None:
    rows = running.of(Rows)
    assert rows is not None
    install_taps(model, POINTS, rows)


def _forward(running: Session, tokens: int, run: Any, *, replayed: bool) -> dict[str, torch.Tensor]:
    """One forward as `ModelRunner.forward` brackets it, and the arrival of its rows."""
    rids = [str(i) for i in range(tokens)]
    zeros, ones = [0] * tokens, [1] * tokens
    plan = ForwardPlan(1, "decode", rids, zeros, ones, [True] * tokens, zeros, ones, [None] * tokens, slots=tokens)
    running.plan = plan
    output = SimpleNamespace(can_run_graph=replayed)

    def original(*_: Any) -> Any:
        run()
        return output

    assert engine_model.forward(original, SimpleNamespace(is_draft_worker=False), None) is output
    assert running.fault is None
    plan.travelling["rows"].send(torch.clone)
    plan.travelling["rows"].arrive()
    return plan.travelling["rows"].finish()


@pytest.mark.reviewed("accelerator rows")
def test_hooks_are_in_the_graph_that_is_captured_before_the_recording(engine: Session) -> None:
    model = LlamaForCausalLM()
    _install(engine, model)
    graph = Graph(model, 8)
    accelerator.check_captured(None, None, None, 8)
    assert engine.fault is None

    engine.recorder = object()  # type: ignore[assignment]  # now it opens
    for tokens, first in ((3, 0.0), (8, 5.0), (1, -2.0)):
        x = torch.arange(first, first + tokens * WIDTH).view(tokens, WIDTH) / 10
        found = _forward(engine, tokens, lambda x=x: graph.replay(x), replayed=True)
        eager = _forward(engine, tokens, lambda x=x: model(x), replayed=False)
        for name, reference in expected(x).items():
            torch.testing.assert_close(found[name], reference, msg=name)
            assert torch.equal(found[name], eager[name]), name


@pytest.mark.reviewed("accelerator rows")
def test_hooks_that_were_not_there_at_capture_give_no_rows(engine: Session) -> None:
    """Negative control: SGLang's own `forward_hooks` are registered after the capture, and silently see nothing."""
    model = LlamaForCausalLM()
    graph = Graph(model, 8)
    _install(engine, model)
    engine.recorder = object()  # type: ignore[assignment]
    model(torch.ones(8, WIDTH))  # plausible rows of another forward
    with pytest.raises(LedgerError, match="hook_embed was not written by the graph that was replayed"):
        _forward(engine, 2, lambda: graph.replay(torch.ones(2, WIDTH)), replayed=True)
