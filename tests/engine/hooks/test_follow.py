"""The hooks follow a live recording that stops and begins again, and tell requests apart as objects.

A stop in the middle of a real server's traffic cannot be timed, so that the scheduler is made up here: what the hooks
read of its batches, overlap scheduling included. `tests/end_to_end/test_live_faults.py` has the real one.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_probe.engine.hooks import guard, requests, scheduler, tree, weights
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.session import Session
from sglang_probe.engine.live import stops
from sglang_probe.engine.live.recording import LiveRecording
from sglang_probe.policy.switches import Switches
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.verify import verify


class Req:
    """What the hooks read of SGLang's `Req`."""

    def __init__(self, rid: str, prompt: list[int], n: int) -> None:
        self.rid, self.n = rid, n
        self.origin_input_ids = self.origin_input_ids_unpadded = array("q", prompt)
        self.output_ids = array("q")
        self.kv = SimpleNamespace(kv_committed_len=0)
        self.retraction_count = self.cached_tokens = 0
        self.is_retracted = False
        self.input_embeds = self.extra_key = self.cache_salt = self.beam_group = None
        self.finished_reason: Any = None

    @property
    def full_untruncated_fill_ids(self) -> array[int]:
        return self.origin_input_ids + self.output_ids

    def finished(self) -> bool:
        return self.finished_reason is not None


class Scheduler:
    """One step behind, as SGLang's overlap scheduling is; every request finishes by length."""

    page_size, max_total_num_tokens = 1, 4096
    tree_cache = None

    def __init__(self) -> None:
        self.forward_ct = 0
        self.waiting_queue: list[Req] = []
        self.running: list[Req] = []
        self._launched: deque[Any] = deque()

    def step(self, *, rows: int = 0) -> None:
        """Launch what there is, and process the result of the forward before; `rows` more are computed than is said."""
        new, self.waiting_queue = self.waiting_queue, []
        # The last token that is sampled needs no step of its own.
        running = [r for r in self.running if r.kv.kv_committed_len < len(r.origin_input_ids) + r.n - 1]
        reqs = new or running
        if reqs:
            lengths = [len(r.origin_input_ids) if new else 1 for r in reqs]
            for r, length in zip(reqs, lengths, strict=True):
                r.kv.kv_committed_len += length
            mode = SimpleNamespace(is_decode=lambda: not new, is_mixed=lambda: False)
            batch = SimpleNamespace(
                reqs=reqs,
                forward_mode=mode,
                prefix_lens=[0] * len(reqs),
                extend_lens=lengths,
                out_cache_loc=SimpleNamespace(shape=(sum(lengths) + rows,)),
            )
            scheduler.run_batch(self._run, self, batch)
            self.running += new
        if len(self._launched) > bool(reqs):
            scheduler.process_batch_result(self._process, self, self._launched.popleft(), RESULT)

    def _run(self, _scheduler: Any, batch: Any) -> Any:
        self.forward_ct += 1
        batch.forward_iter = self.forward_ct
        self._launched.append(batch)
        return RESULT

    def _process(self, _scheduler: Any, batch: Any, _result: Any) -> None:
        for r in batch.reqs:
            r.output_ids.append(9)
            if len(r.output_ids) == r.n:
                r.finished_reason = SimpleNamespace(to_json=lambda: {"type": "length"})
                self.running.remove(r)

    def serve(self, *reqs: Req) -> None:
        self.waiting_queue += reqs
        while not all(r.finished() for r in reqs):
            self.step()


RESULT = SimpleNamespace(can_run_cuda_graph=False)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(stops, "_FIRST", 0.01)
    config = EngineProbeConfig.model_validate(
        {"run": tmp_path / "live", "live": {"privacy": "ids", "segments": {"min_seconds": 0}}}
    )
    running = Session(config)
    running._scheduler, running._start = Scheduler(), Switches()
    assert config.live is not None
    running.live = LiveRecording(config.run, config.live, {"hook_points": {}}, part_seconds=0.05, tick=0.02)
    monkeypatch.setattr(guard, "session", running)
    running.open()
    yield running
    running.live.close()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def _closed(session: Session) -> Run:
    assert session.live is not None
    asked = session.live.ask_flush()
    _until(lambda: session.live.status()["flush"]["done"] >= asked)  # type: ignore[union-attr]
    run = load_run(session.live.status()["flush"]["segment"])
    assert [c.violation for c in verify(run) if not c.holds] == []
    return run


@pytest.mark.parametrize("unrecorded_steps", [0, 1, 2, 3])
def test_requests_in_flight_at_a_stop_go_on_in_the_next_segment(session: Session, unrecorded_steps: int) -> None:
    engine, live = session._scheduler, session.live
    assert live is not None
    long, ends_unseen = Req("long", [1, 2, 3], 20), Req("ends unseen", [4, 5], 6)
    engine.waiting_queue += [long, ends_unseen]
    for _ in range(4):
        engine.step()
    session.fail("somewhere", KeyError("x"))
    assert not live.status()["recording"]
    for _ in range(unrecorded_steps):
        engine.step()
    _until(lambda: live.status()["recording"])
    new = Req("new", [1, 2, 3, 4], 3)
    while not new.finished():
        engine.waiting_queue += [new] if not new.kv.kv_committed_len else []
        engine.step()
    while not long.finished():
        engine.step()
    engine.step()
    assert session.fault is None
    assert live.status()["requests_in_flight"] == 0
    run = _closed(session)
    assert run.requests().set_index("rid")["finish_reason"].loc[["long", "new"]].tolist() == ["length", "length"]
    assert "long" in run.manifest["segment"]["carried_in"]
    stopped = load_run(run.path.with_name("segment-00000"))
    assert [c.violation for c in verify(stopped) if not c.holds] == []
    assert stopped.manifest["requests_by_finish"] == {"interrupted": 2}
    assert live.status()["stops"]["probe"] == 1


def test_requests_with_one_id_at_the_same_time_are_two(session: Session) -> None:
    twins = [Req("twin", [1, 2, 3], 4), Req("twin", [1, 2, 3], 7), Req("twin~1", [5, 6], 5)]
    session._scheduler.serve(*twins)
    session._scheduler.step()
    run = _closed(session)
    assert dict(run.requests()[["rid", "output_len"]].to_numpy()) == {"twin": 4, "twin~1": 7, "twin~~1": 5}


def test_a_forward_of_more_rows_than_positions_costs_its_requests_and_nobody_else(session: Session) -> None:
    engine = session._scheduler
    engine.serve(Req("before", [7, 8], 3))
    beams = Req("beams", [1, 2, 3], 6)
    engine.waiting_queue.append(beams)
    engine.step()
    engine.step(rows=3)
    while not beams.finished():
        engine.step()
    engine.serve(Req("after", [7, 8, 9], 3))
    engine.step()
    assert session.fault is None
    run = _closed(session)
    assert run.manifest["requests_by_finish"] == {"length": 2, "unaccounted": 1}
    assert "allocated 4 KV slots for a forward pass of 1" in run.manifest["unaccounted"]["beams"]


def test_a_request_whose_end_cannot_be_read_costs_its_own_record(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_of = scheduler.end_of
    monkeypatch.setattr(scheduler, "end_of", lambda r, why=None: 1 / 0 if r.rid == "odd" else end_of(r, why))
    session._scheduler.serve(Req("odd", [1, 2], 4), Req("good", [3, 4], 4))
    session._scheduler.step()
    assert _closed(session).manifest["requests_by_finish"] == {"length": 1, "unaccounted": 1}


@pytest.mark.parametrize("given", ["input_embeds", "positional_embed_overrides"])
def test_a_prompt_that_is_not_its_token_ids_is_not_recorded_as_if_it_were(session: Session, given: str) -> None:
    embeddings = Req("embeddings", [1, 1], 3)
    setattr(embeddings, given, [[0.5]])
    session._scheduler.serve(Req("tokens", [3, 4], 3), embeddings)
    session._scheduler.step()
    prompts = _closed(session).requests().set_index("rid")["prompt_ids"]
    assert prompts["tokens"].tolist() == [3, 4]
    assert prompts["embeddings"] is None


def test_forwards_are_recorded_with_the_weights_that_they_had(session: Session) -> None:
    engine = session._scheduler
    engine.waiting_queue.append(long := Req("long", [1, 2, 3], 8))
    for _ in range(4):
        engine.step()
    session.weights_changed("disk", "v2", "/models/other")
    while not long.finished():
        engine.step()
    engine.step()
    session.weights_changed("renamed", "v3", None)
    run = _closed(session)
    runs = [load_run(p) for p in sorted(run.path.parent.glob("segment-*")) if p <= run.path]
    found = [w for r in runs for w in r.forwards()["weights"]]
    assert found == [0] * 4 + [1] * 4
    told = {w["number"]: w.get("version") for w in run.manifest["weights"]}
    assert told == {0: None, 1: "v2", 2: "v3"}
    assert session.live.status()["weights"]["version"] == "v3"  # type: ignore[union-attr]


def test_every_way_of_an_update_is_counted(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "release", lambda: SimpleNamespace(weight_version_after=lambda _request: "v"))
    request = SimpleNamespace(model_path="/m", tags=None)
    for hook in (
        weights.update_from_disk,
        weights.update_from_distributed,
        weights.update_from_tensor,
        weights.update_from_ipc,
        weights.begin_session,
        weights.end_session,
        weights.resume_memory,
        weights.renamed,
    ):
        before = session.weights[-1]["number"]
        hook(SimpleNamespace(success=False), None, request)
        assert session.weights[-1]["number"] == before + 1
    weights.resume_memory(None, None, SimpleNamespace(tags=["kv_cache"]))
    assert session.weights[-1]["number"] == before + 1


def test_a_look_at_the_tree_for_a_request_that_waits_costs_a_number(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_req: Any) -> int:
        raise AssertionError("asked of a request that waits")

    req, cache = Req("a", [1, 2, 3, 4, 5], 2), SimpleNamespace(disable=False)
    assert tree.matched(req) is None
    monkeypatch.setattr(requests, "read_limit", never)
    for _ in range(3):
        tree.match(None, req, cache, max_prefix_len=2)
    monkeypatch.setattr(requests, "read_limit", lambda _req: None)
    found = tree.matched(req)
    assert found is not None
    assert (found.order, found.limit, found.limited_by) == (3, 2, "logprob_start")
    tree.match(None, req, cache)
    monkeypatch.setattr(requests, "read_limit", lambda _req: 3)
    found = tree.matched(req)
    assert found is not None
    assert (found.order, found.limit, found.limited_by) == (4, 3, "asked")
    tree.match(None, req, SimpleNamespace(disable=True))
    found = tree.matched(req)
    assert found is not None
    assert (found.order, found.limit, found.limited_by) == (5, 0, "cache off")
