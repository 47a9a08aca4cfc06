"""What the adapter of 0.5.17 does itself, on that release's own classes, without an engine."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.hooks import control
from sglang_probe.engine.hooks import scheduler as accounting
from sglang_probe.engine.hooks import tree as lineage
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import live
from sglang_probe.engine.hooks.instruments.rows import Rows
from sglang_probe.engine.hooks.session import Session
from sglang_probe.engine.ledger.facts import ForwardPlan
from sglang_probe.engine.releases import release
from sglang_probe.engine.releases import release_0_5_17 as adapter
from sglang_probe.errors import LedgerError, UnsupportedError
from tests.engine.made_session import SCHEDULER, made_request, make_session, set_taps

pytestmark = pytest.mark.skipif(release().version != "0.5.17", reason="another release of SGLang is installed")


def request(cache: str | None = None) -> Any:
    req = made_request(**({"cache": cache} if cache else {}))
    adapter.init_req_max_new_tokens(None, SCHEDULER, req)
    return req


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Session:
    return make_session(monkeypatch, EngineProbeConfig(run=tmp_path, asks=["cache"]))


@pytest.mark.usefixtures("asked")
def test_a_request_that_does_not_read_matches_nothing() -> None:
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    tree = RadixCache.create_simulated()
    ids = array("q", range(10))
    tree.insert(InsertParams(key=RadixKey(ids), value=torch.arange(10)))

    def matched(req: Any) -> int:
        params = MatchPrefixParams(key=RadixKey(ids), req=req)
        return len(adapter.match_prefix(RadixCache.match_prefix, tree, params).device_indices)

    assert matched(request()) == matched(request("read_only")) == matched(None) == 10
    assert matched(request("write_only")) == matched(request("off")) == 0


@pytest.mark.usefixtures("asked")
def test_a_request_that_does_not_write_is_told_so() -> None:
    told = [request(use).skip_radix_cache_insert for use in (None, "write_only", "read_only", "off")]
    assert told == [False, False, True, True]


def test_the_tree_of_waiting_prompts_is_not_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lpm` empties it before each forward, and what the cache holds would be forgotten."""
    from sglang.srt.managers.schedule_policy import SchedulePolicy
    from sglang.srt.mem_cache.radix_cache import RadixCache

    forgotten: list[Any] = []
    monkeypatch.setattr(lineage, "reset", lambda _result, tree: forgotten.append(tree))
    cache = RadixCache.create_simulated(mock_allocator=SimpleNamespace(device="cpu"))
    waiting = SchedulePolicy("lpm", cache, False, False, None).waiting_queue_radix_tree
    for tree in (waiting, cache):
        adapter.reset(tree.reset(), tree)
    assert forgotten == [cache]


def test_our_attention_backend_is_refused_by_name() -> None:
    from sglang_probe.engine.platform.limits import refuse_without_gpu

    refuse_without_gpu({"attention_backend": "torch_native"})
    with pytest.raises(UnsupportedError, match="`attention_backend: probe_torch` cannot run"):
        refuse_without_gpu({"attention_backend": "probe_torch"})


@pytest.mark.parametrize(("disable", "skip"), [(True, False), (False, True), (False, False)])
def test_a_chunk_that_was_not_published_is_done(disable: bool, skip: bool) -> None:
    table = torch.arange(20, dtype=torch.int32).reshape(2, 10)
    tree = SimpleNamespace(disable=disable, req_to_token_pool=SimpleNamespace(req_to_token=table))
    req = SimpleNamespace(
        skip_radix_cache_insert=skip,
        req_pool_idx=1,
        extend_range=SimpleNamespace(end=7),
        prefix_indices="as SGLang left it",
    )
    adapter.keep_chunks(None, req, tree)
    if not disable and not skip:
        assert req.prefix_indices == "as SGLang left it"
        return
    assert req.prefix_indices.tolist() == [10, 11, 12, 13, 14, 15, 16]
    assert req.prefix_indices.dtype == torch.int64
    table.zero_()  # the row is rewritten while the request runs
    assert req.prefix_indices.tolist()[0] == 10


def test_a_dropped_request_is_told_from_other_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.io_struct import AbortReq, FlushCacheReqOutput
    from sglang.srt.managers.schedule_batch import Req

    aborted: list[Any] = []
    monkeypatch.setattr(accounting, "make_abort_req", lambda _result, req: aborted.append(req))
    req = object.__new__(Req)
    adapter.send_output(None, None, AbortReq(rid="x"), req)
    adapter.send_output(None, None, AbortReq(rid="x"))
    adapter.send_output(None, None, FlushCacheReqOutput(success=True), req)
    assert aborted == [req]


def test_our_keys_are_carried_out_and_others_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.io_struct import SetInternalStateReq, SetInternalStateReqOutput

    done: list[tuple[str, Any]] = []
    left: list[dict[str, Any]] = []

    def carry_out(key: str, value: Any) -> None:
        if value == 13:
            raise control.Refused("no")
        done.append((key, value))

    def original(_scheduler: Any, asked: Any) -> Any:
        left.append(dict(asked.server_args))
        return SetInternalStateReqOutput(updated=True)

    monkeypatch.setattr(control, "carry_out", carry_out)

    def tell(**arguments: Any) -> bool:
        return bool(adapter.set_internal_state(original, None, SetInternalStateReq(server_args=arguments)).updated)

    assert tell(probe_close=1)
    assert tell(pp_max_micro_batch_size=4)
    assert tell(probe_open=2, pp_max_micro_batch_size=5)
    assert not tell(probe_open=13, pp_max_micro_batch_size=6)
    assert done == [("probe_close", 1), ("probe_open", 2)]
    assert left == [{"pp_max_micro_batch_size": 4}, {"pp_max_micro_batch_size": 5}]


def test_provenance_is_added_to_what_others_return(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.io_struct import unwrap_from_pickle, wrap_as_pickle

    asked: list[Any] = []

    def provenance_by_id(rids: list[str], finished: list[bool]) -> list[Any]:
        asked.append((rids, finished))
        return [["span"] if done else [] for done in finished]

    monkeypatch.setattr(live, "anybody_asks", lambda: True)
    monkeypatch.setattr(live, "provenance_by_id", provenance_by_id)
    theirs = wrap_as_pickle({"theirs": [[1], [2]]})
    payload = SimpleNamespace(rids=["a", "b"], finished_reasons=[None, {"type": "stop"}], customized_info=theirs)
    adapter.to_payload(payload, SimpleNamespace(rust_server_mode=False))
    assert unwrap_from_pickle(payload.customized_info) == {"theirs": [[1], [2]], "probe": [[], ["span"]]}
    assert asked == [(["a", "b"], [False, True])]
    adapter.to_payload(None, SimpleNamespace(rust_server_mode=False))  # nothing to send


def test_the_residual_is_the_sum_and_an_open_sum_is_refused() -> None:
    hidden, residual = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
    assert release().residual(None, (hidden, residual)).tolist() == [[11.0, 22.0]]
    hidden._sglang_needs_allreduce_fusion = True  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="share of a sum"):
        release().residual(None, (hidden, residual))


@pytest.mark.parametrize("page", [2, 16])
def test_the_page_allocator_gives_every_request_pages_of_its_own(page: int) -> None:
    """Against the definition: within a page slots are consecutive, position `p` lies at `p % page`, and no page has two
    requests."""
    from sglang_probe.engine.platform.cpu_0_5_17 import _allocator

    pages = 16
    allocator = _allocator(
        pages * page, page_size=page, dtype=torch.bfloat16, device="cpu", kvcache=None, need_sort=False
    )
    rows: list[list[int]] = [[], []]

    def grow(by: tuple[int, int], *, decode: bool = False) -> bool:
        before, after = ([len(row) + n for row, n in zip(rows, add, strict=True)] for add in ((0, 0), by))
        last = torch.tensor([row[-1] if row else -1 for row in rows], dtype=torch.int32 if decode else torch.int64)
        seq = torch.tensor(after)
        if decode:
            slots = allocator.alloc_decode(seq, seq, last)
        else:
            prefix = torch.tensor(before)
            slots = allocator.alloc_extend(prefix, prefix, seq, seq, last, sum(by))
        if slots is None:
            return False
        flat = iter(slots.tolist())
        for row, n in zip(rows, by, strict=True):
            row += [next(flat) for _ in range(n)]
        return True

    for by in ((page + 1, 2 * page), (1, 3), (page, page - 1)):
        assert grow(by)
    for _ in range(2 * page + 1):
        assert grow((1, 1), decode=True)
    for row in rows:
        assert all(slot % page == p % page for p, slot in enumerate(row))
        assert len({slot // page for slot in row}) == -(-len(row) // page)
    owned = [{slot // page for slot in row} for row in rows]
    assert not owned[0] & owned[1]
    assert 0 not in owned[0] | owned[1]  # the page for padding
    assert len(allocator.free_pages) == pages - len(owned[0]) - len(owned[1])
    free = len(allocator.free_pages)
    assert not grow((free * page + page, 1))  # more than there is: nothing is taken
    assert len(allocator.free_pages) == free


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Session:
    running = make_session(monkeypatch, EngineProbeConfig(run=tmp_path, simulated_graphs=True), Rows)
    set_taps(running, GraphTaps({"h": (2, torch.float32)}, capacity=4, device="cpu"))
    return running


def launched(running: Session, value: float, *, overlap: bool = True) -> tuple[ForwardPlan, Any]:
    """A forward of two tokens whose rows are `value`, and SGLang's result of it."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.utils import GenerationBatchResult

    rows = running.of(Rows)
    assert rows is not None
    assert isinstance(rows.taps, GraphTaps)
    plan = ForwardPlan(1, "decode", ["a", "b"], [1, 1], [2, 2], [True, True], [0, 0], [1, 1], [None, None], slots=2)
    rows.taps.arm()
    rows.taps.write("h", torch.full((2, 2), value))
    plan.travelling["rows"] = rows.taps.snapshot(2, replayed=False)
    running.plan = plan
    logits = LogitsProcessorOutput(next_token_logits=None)
    result = GenerationBatchResult(logits_output=logits, next_token_ids=torch.zeros(2, dtype=torch.int64))
    adapter.forward_batch_generation(result, SimpleNamespace(enable_overlap=overlap))
    running.plan = None  # the launch is over
    return plan, result


def copied(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's `copy_to_cpu` under our hook; the event is a device's."""
    from sglang.srt.managers.utils import GenerationBatchResult

    monkeypatch.setattr("sglang.srt.managers.utils._async_d2h", torch.clone)
    original = GenerationBatchResult.copy_to_cpu

    def copy(result: Any) -> None:
        result.copy_done = SimpleNamespace(record=lambda: None)
        adapter.copy_to_cpu(original, result, return_logprob=False)

    return copy


def test_rows_are_sent_in_front_of_sglangs_copies(recording: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copied(monkeypatch)
    made = [(v, *launched(recording, v)) for v in (1.0, 2.0)]  # both launched before the first is processed
    for value, plan, result in made:
        copy(result)
        with pytest.raises(LedgerError, match="had not arrived"):
            plan.travelling["rows"].finish()
        adapter.process_batch_result(None, None, None, result)
        assert plan.travelling["rows"].finish()["h"].tolist() == [[value] * 2] * 2
    assert recording.fault is None


def test_without_overlap_rows_are_sent_with_the_forward(recording: Session) -> None:
    plan, result = launched(recording, 3.0, overlap=False)
    adapter.process_batch_result(None, None, None, result)
    assert plan.travelling["rows"].finish()["h"].tolist() == [[3.0] * 2] * 2
    assert recording.fault is None


def test_rows_that_were_not_copied_or_are_still_travelling_end_the_recording(
    recording: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, result = launched(recording, 4.0)
    adapter.process_batch_result(None, None, None, result)
    assert recording.fault is not None
    assert "still on their way" in recording.fault
    monkeypatch.setattr(recording, "fault", None)
    monkeypatch.setattr(recording, "recorder", object())
    _, result = launched(recording, 4.0)
    copied(monkeypatch)(result)
    transfers, _ = result._sglang_probe_rows
    result._sglang_probe_rows = (transfers, SimpleNamespace(query=lambda: False))
    adapter.process_batch_result(None, None, None, result)
    assert recording.fault is not None
    assert "still on their way" in recording.fault
