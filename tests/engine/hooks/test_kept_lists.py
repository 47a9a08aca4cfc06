"""Kept sets after any attention backend: the rows of queries past their cache are replaced, and no others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sglang_probe.engine.capture.transfer import upload
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import accelerator, kept_lists, kept_sets
from sglang_probe.engine.hooks.instruments.base import Forward
from sglang_probe.engine.hooks.instruments.kept_lists import KeptByLists
from sglang_probe.engine.hooks.instruments.kept_sets import GRAPHS, KeptSets, open_sets
from sglang_probe.engine.ledger.facts import ForwardPlan
from sglang_probe.engine.platform.kept_attention import attend_masked
from sglang_probe.engine.platform.kept_rows import KeptRow
from sglang_probe.errors import LedgerError, UnsupportedError
from sglang_probe.harvest import kept as harvest_kept
from sglang_probe.kept_set import Kept
from tests.engine.made_session import make_session

sys.path.insert(0, str(Path(__file__).parent / "plugin"))

from no_device_reads import without_reads

LAYERS, HEADS, KV_HEADS, DIM, SLOTS = 2, 4, 2, 8, 120
SCALING = DIM**-0.5
K_POOLS, V_POOLS = torch.randn(2, LAYERS, SLOTS, KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
TABLE = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1)).view(4, 30).int()


class Core(torch.nn.Module):
    """`RadixAttention` over a backend that knows nothing of kept sets."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer_id, self.tp_q_head_num, self.tp_k_head_num, self.head_dim = layer, HEADS, KV_HEADS, DIM
        self.scaling, self.logit_cap, self.sliding_window_size = SCALING, 0, -1

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return torch.full_like(q, 7.0)


class Engine:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setattr(kept_lists, "check_attention", lambda *_: None)  # no SGLang modules
        self.session = make_session(monkeypatch, EngineProbeConfig(run=folder, asks=["evict"]), KeptSets, opened=False)
        self.session.recorder = object()  # type: ignore[assignment]
        self.cores = [Core(i) for i in range(LAYERS)]
        layers = [SimpleNamespace(self_attn=SimpleNamespace(attn=core)) for core in self.cores]
        self.runner = SimpleNamespace(
            model=SimpleNamespace(model=SimpleNamespace(layers=layers)),
            device="cpu",
            dtype=torch.float32,
            req_to_token_pool=SimpleNamespace(req_to_token=TABLE.clone()),
            token_to_kv_pool=SimpleNamespace(
                get_key_buffer=lambda i: K_POOLS[i], get_value_buffer=lambda i: V_POOLS[i]
            ),
        )
        self.lists = KeptByLists(self.runner)

    def before(self, starts: list[int], ends: list[int], rows: Sequence[KeptRow]) -> Forward:
        n = len(starts)
        rids = [str(i) for i in range(n)]
        plan = ForwardPlan(1, "mixed", rids, starts, ends, [True] * n, [0] * n, starts, [None] * n, slots=n)
        forward = Forward(self.runner, SimpleNamespace(req_pool_indices=torch.arange(n)), plan)
        self.lists.before(forward, rows)
        self.runner.req_to_token_pool.req_to_token.fill_(0)  # the scheduler may write it for the next forward
        return forward


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    return Engine(monkeypatch, tmp_path)


def kept(n: int, steps: int = 1) -> Kept:
    keep = torch.rand(steps, LAYERS, KV_HEADS, n, generator=torch.Generator().manual_seed(n)) < 0.5
    keep.from_host = True  # type: ignore[attr-defined]  # for `without_reads`
    return Kept(keep)


def expected(q_NHD: torch.Tensor, row: KeptRow, layer: int, positions: range) -> torch.Tensor:
    """Each query over the positions that its kv head may see, written out."""
    slots = TABLE[row.row, : row.end].long()
    seen = torch.stack([_seen(row.kept, layer, p, row.end) for p in positions], 1)
    return attend_masked(q_NHD, K_POOLS[layer][slots], V_POOLS[layer][slots], seen, SCALING).flatten(1)


def _seen(of: Kept, layer: int, position: int, end: int) -> torch.Tensor:
    rest = torch.arange(of.length, end) <= position
    return torch.cat([of.at(position)[layer], rest.expand(KV_HEADS, -1)], -1)


def test_rows_past_a_cache_are_replaced_and_no_others(engine: Engine) -> None:
    """A request of a full cache, one that decodes, a chunk that crosses the end of its cache, another that decodes."""
    starts, ends = [5, 20, 9, 14], [6, 21, 16, 15]
    rows = [
        KeptRow(1, "1", 0, kept(12), 20, 21),
        KeptRow(2, "2", 0, kept(11), 9, 16),
        KeptRow(3, "3", 0, kept(13, steps=4), 14, 15),
    ]
    q = torch.randn(10, HEADS * DIM, generator=torch.Generator().manual_seed(2))
    engine.before(starts, ends, rows)
    for layer, core in enumerate(engine.cores):
        found, q_NHD = core(q), q.view(-1, HEADS, DIM)
        torch.testing.assert_close(found[1:2], expected(q_NHD[1:2], rows[0], layer, range(20, 21)))
        torch.testing.assert_close(found[4:9], expected(q_NHD[4:9], rows[1], layer, range(11, 16)))
        torch.testing.assert_close(found[9:], expected(q_NHD[9:], rows[2], layer, range(14, 15)))
        assert bool((found[[0, 2, 3]] == 7).all())
    assert engine.session.fault is None


def test_kept_positions_are_those_of_the_step_and_of_the_request(engine: Engine) -> None:
    """They stay on the device from step to step, until another request or another step's set is there."""
    q = torch.randn(1, HEADS * DIM, generator=torch.Generator().manual_seed(3))
    steps = [("a", kept(10), 12), ("a", kept(10), 13), ("b", kept(9), 13), ("c", kept(8, 9), 10), ("c", kept(8, 9), 11)]
    for rid, of, start in steps:
        engine.runner.req_to_token_pool.req_to_token.copy_(TABLE)
        row = KeptRow(0, rid, 0, of, start, start + 1)
        engine.before([start], [start + 1], [row])
        found = engine.cores[1](q)
        torch.testing.assert_close(found, expected(q.view(1, HEADS, DIM), row, 1, range(start, start + 1)))


def test_a_forward_without_kept_sets_is_left_alone(engine: Engine) -> None:
    engine.before([20], [21], [KeptRow(0, "0", 0, kept(12), 20, 21)])
    engine.before([21], [22], [])
    assert bool((engine.cores[0](torch.ones(1, HEADS * DIM)) == 7).all())


def test_the_host_reads_nothing_of_a_decode_step(engine: Engine) -> None:
    row = KeptRow(0, "0", 0, kept(12), 20, 21)
    core, q = engine.cores[0], torch.ones(1, HEADS * DIM)
    without_reads(engine.before)([20], [21], [row])
    assert not bool((without_reads(lambda: core(q))() == 7).any()), engine.session.fault


def test_a_replayed_forward_ends_the_recording(engine: Engine) -> None:
    forward = engine.before([20], [21], [KeptRow(0, "0", 0, kept(12), 20, 21)])
    forward.replayed = True
    with pytest.raises(LedgerError, match="replayed from a graph"):
        engine.lists.after(forward)
    engine.lists.after(forward)  # nothing was replaced any more


def test_an_engine_with_graphs_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the engine, and before one is started; whichever backend it has."""
    for backend in ("flashinfer", "fa3", "triton"):
        server = SimpleNamespace(
            attention_backend=backend,
            prefill_attention_backend=None,
            decode_attention_backend=None,
            disable_cuda_graph=False,
        )
        scheduler = SimpleNamespace(
            server_args=server,
            model_config=None,
            tp_worker=SimpleNamespace(model_runner=SimpleNamespace(device="cuda")),
        )
        monkeypatch.setattr(kept_sets, "has_graphs", lambda: True)
        with pytest.raises(UnsupportedError, match="has graphs"):
            open_sets(scheduler, tmp_path, by_lists=True)
        with pytest.raises(UnsupportedError, match=f"this engine has \\['{backend}'\\]"):
            open_sets(scheduler, tmp_path, by_lists=False)
        monkeypatch.setattr(harvest_kept, "accelerator_present", lambda: True)
        with pytest.raises(UnsupportedError, match=GRAPHS):
            harvest_kept.check_backend({"attention_backend": backend})
        without = {"attention_backend": backend, "disable_cuda_graph": True}
        harvest_kept.check_backend(without)
        harvest_kept.check_backend({**without, "cuda_graph_backend_prefill": "disabled"})
        with pytest.raises(UnsupportedError, match="`cuda_graph_backend_prefill`"):
            harvest_kept.check_backend({**without, "cuda_graph_backend_prefill": "breakable"})


@pytest.mark.parametrize(("decode", "prefill"), [("full", "disabled"), ("disabled", "breakable")])
def test_what_is_set_for_a_phase_goes_before_disable_cuda_graph(
    monkeypatch: pytest.MonkeyPatch, decode: str, prefill: str
) -> None:
    from sglang.srt import runtime_context

    phases = SimpleNamespace(decode=SimpleNamespace(backend=decode), prefill=SimpleNamespace(backend=prefill))
    told = SimpleNamespace(graph=SimpleNamespace(cuda_graph_config=phases, disable_cuda_graph=True))
    monkeypatch.setattr(runtime_context, "get_exec", lambda: told)
    assert accelerator.has_graphs()
    phases.decode.backend = phases.prefill.backend = "disabled"
    assert not accelerator.has_graphs()


def test_an_engine_of_a_model_that_was_not_reviewed_is_refused_whatever_attends(tmp_path: Path) -> None:
    kept_sets_of = KeptSets(EngineProbeConfig(run=tmp_path, asks=["evict"]))
    with pytest.raises(UnsupportedError, match="kept sets of Core"):
        kept_sets_of.attach(SimpleNamespace(model=Core(0)))


def test_masks_are_uploaded_from_pinned_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from pageable memory makes the host wait, `non_blocking` or not."""
    uploaded = []
    monkeypatch.setattr(kept_lists, "upload", lambda x, device: uploaded.append(x.shape) or upload(x, device))
    engine.before([9], [16], [KeptRow(0, "0", 0, kept(11), 9, 16)])
    engine.cores[0](torch.ones(7, HEADS * DIM))
    assert uploaded == [(KV_HEADS, 5, 16)]
