"""What a harvest makes of an engine that dies, refuses or stops recording, and what `--resume` makes of that.

The engine is made up: it writes a real ledger, and ends on cue. What a real one does when it is killed is in
`tests/end_to_end/test_harvest.py`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_probe.engine.hooks.config import FAULT_FILE, EngineProbeConfig
from sglang_probe.engine.ledger import clock
from sglang_probe.engine.ledger.facts import Context, ForwardPlan, RequestEnd
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.errors import ProbeError
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.death import EngineDied
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.in_flight import Answer, Refusal
from sglang_probe.harvest.job import Job, job_of
from sglang_probe.harvest.prepare import prepare
from sglang_probe.harvest.recording import harvest
from sglang_probe.policy.arm import Arm
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.verify import verify
from sglang_probe.workload.request import asked_rid

REQUESTS = 6


class MadeEngine:
    """Serves in groups of what is in flight at once. `ends`: what happens at a request, by its number."""

    server_args: dict[str, Any] = {}
    restarts = 0

    def __init__(self, probe: EngineProbeConfig, ends: dict[int, str], served: list[list[str]]) -> None:
        self._probe, self._ends, self.served = probe, ends, served
        self._writer = Writer(
            probe.run, session=probe.start, dp_rank=probe.replica, part_seconds=probe.checkpoint_seconds
        )
        self._recorder = Recorder(
            self._writer,
            lineage=Lineage(1, 1000),
            captures_rows=False,
            first_forward=self._writer.forwards_end,
            first_row=self._writer.rows_end,
        )
        self._tag = 0

    def in_force(self) -> dict[str, Any]:
        return {"server_resolved": {}, "weights": [{"number": 0, "how": "model_path"}]}

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(main)

    async def serve_groups(
        self, groups: Sequence[Sequence[tuple[str, Sequence[int], dict[str, Any]]]], concurrency: int | None, order: str
    ) -> AsyncIterator[Answer | Refusal]:
        for group in groups:
            n = concurrency or len(group)
            for at in range(0, len(group), n):
                batch = group[at : at + n]
                rids = [rid for rid, _, _ in batch]
                self.served.append([asked_rid(rid) for rid in rids])
                ends = [self._ends.get(int(asked_rid(rid)[1:])) for rid in rids]
                if "dies" in ends:
                    self._writer.flush(10)
                    self._writer.stop()
                    raise EngineDied("a process of the engine was killed by SIGKILL", fix="memory", in_flight=rids)
                if "full" in ends:
                    (self._probe.run / FAULT_FILE).write_text("put: the writer stopped: No space left on device")
                    raise ProbeError("put: the writer stopped: No space left on device")
                for (rid, prompt, _), end in zip(batch, ends, strict=True):
                    if end == "refused":
                        yield Refusal(rid, "too long")
                    else:
                        self._serve(rid, prompt)
                        yield Answer(rid, [5], 0)

    def _serve(self, rid: str, prompt: Sequence[int]) -> None:
        self._tag += 1
        n = len(prompt)
        context = Context(np.array(prompt), None)
        plan = ForwardPlan(self._tag, "extend", [rid], [0], [n], [False], [0], [n], [context], n)
        self._recorder.launch(plan)
        self._recorder.commit(self._tag, graph=False, ended=[RequestEnd(rid, n, 1, 0, 0, "length", [5])])

    def close_recording(self) -> None:
        self._recorder.drain()
        self._writer.flush(10)
        self._writer.stop()

    def stop(self) -> None:
        self._writer.stop()
        self._writer._thread.join(10)


class MadeHost(EngineHost):
    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[int, str] = {}
        self.served: list[list[str]] = []

    def open(self, model_path: str, server: dict[str, Any], probe: EngineProbeConfig, *_rest: Any) -> Any:
        self._engine = MadeEngine(probe, self.ends, self.served)  # type: ignore[assignment]
        return self._engine


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """`REQUESTS` requests, two at a time."""
    file = tmp_path_factory.mktemp("workload") / "requests.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"number {i}"}) for i in range(REQUESTS)))
    fields: dict[str, Any] = {"workload": {"source": "jsonl", "path": file}, "concurrency": 2, "hook_points": []}
    prepared = prepare(HarvestConfig.model_validate({**fields, "sampling": {"max_new_tokens": 1}}))
    return job_of(prepared, "run", prepared.workload.requests, arm=Arm())


@pytest.fixture
def recording(job: Job, tmp_path: Path) -> Any:
    """Record the job with an engine that `ends` so."""
    host = MadeHost()

    def record(ends: dict[int, str], **how: bool) -> tuple[Run, list[list[str]], str]:
        host.ends = ends
        host.served.clear()
        said = ""
        try:
            harvest(job, tmp_path / "out" / "run", host, **how)
        except ProbeError as e:
            said = str(e)
        run = load_run(tmp_path / "out" / "run")
        assert [str(c) for c in verify(run) if not c.holds] == []
        return run, list(host.served), said

    record.path = tmp_path / "out" / "run"  # type: ignore[attr-defined]
    return record


def name(i: int) -> str:
    return f"r{i:06d}"


def test_a_request_that_ends_the_engine_is_found_and_the_rest_is_served(recording: Any) -> None:
    run, _, said = recording({3: "dies"})
    assert not run.complete
    assert f"killed by SIGKILL; requests in flight: {name(2)}, {name(3)}" in said
    assert run.manifest["fault"] in said
    assert len(run.requests()) == 2

    run, served, said = recording({3: "dies"}, resume=True)
    assert served == [[name(4), name(5)], [name(2)], [name(3)]], "suspects come last, and alone"
    assert f"requests in flight: {name(3)}" in said
    assert len(run.requests()) == 5

    run, served, said = recording({3: "dies"}, resume=True)
    assert (served, said, run.complete) == ([], "", True)
    assert run.manifest["requests_by_finish"] == {"length": 5, "refused": 1}
    assert "the second time when it was served alone" in run.manifest["refused"][name(3)]
    assert run.manifest["ended_engine"] == {}


def test_what_was_in_flight_beside_it_is_served_as_soon_as_it_ends_well(recording: Any) -> None:
    recording({3: "dies"})
    run, served, said = recording({}, resume=True)
    assert (len(served), said, run.complete) == (3, "", True)
    assert run.manifest["refused"] == run.manifest["ended_engine"] == {}
    assert run.manifest["fault"] is None


def test_a_clock_that_is_set_back_between_two_starts_is_no_disorder(
    recording: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording({3: "dies"})
    monkeypatch.setattr(clock, "_OFFSET", clock._OFFSET - 86_400)
    run, _, said = recording({}, resume=True)
    assert (said, run.complete) == ("", True)
    assert run.forwards()["launched"].diff().min() < -80_000


def test_refused_requests_are_counted_and_not_asked_again(recording: Any) -> None:
    run, _, _ = recording({1: "refused", 4: "dies"})
    assert run.manifest["refused"] == {name(1): "too long"}
    run, served, _ = recording({}, resume=True)
    assert not any(name(1) in rids for rids in served)
    assert run.complete
    assert run.manifest["requests_by_finish"] == {"length": 5, "refused": 1}
    assert run.requests().set_index("rid").loc[name(1), "refusal"] == "too long"


def test_if_all_are_refused_that_is_an_error_and_what_was_there_is_put_back(recording: Any) -> None:
    before, _, _ = recording({})
    run, _, said = recording(dict.fromkeys(range(REQUESTS), "refused"), overwrite=True)
    assert f"SGLang refused every request; {name(0)}: too long" in said
    assert run.complete
    assert run.manifest["created"] == before.manifest["created"]


def test_a_full_disk_ends_the_serving_and_the_directory_says_so(recording: Any) -> None:
    run, served, said = recording({2: "full"})
    assert len(served) == 2
    assert "No space left on device" in run.manifest["fault"]
    assert "make room on the disk, then finish the run with --resume" in said
    run, _, said = recording({}, resume=True)
    assert (run.complete, said, (run.path / FAULT_FILE).exists()) == (True, "", False)


def test_an_overwrite_keeps_the_complete_run_until_another_one_is(recording: Any) -> None:
    recording({})
    recording({4: "dies"}, overwrite=True)
    aside = recording.path.with_name(".run.replaced")
    assert json.loads((aside / MANIFEST).read_text())["status"] == "complete"
    recording({2: "dies"}, overwrite=True)
    assert json.loads((aside / MANIFEST).read_text())["status"] == "complete"
    run, _, _ = recording({}, resume=True)
    assert run.complete
    assert [p.name for p in recording.path.parent.iterdir()] == ["run"]
