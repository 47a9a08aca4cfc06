"""What several engines make of one run when one of them ends, or its process does: nothing is lost or served twice.

The engines are made up: each writes a real ledger, and ends on cue. Real ones on Ray are in
`tests/end_to_end/test_replicas.py`."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.engine.hooks.config import CRASHED, ENGINE_FILE, EngineProbeConfig, fault_file
from sglang_probe.errors import ConfigError, ProbeError, UnsupportedError
from sglang_probe.harvest import prepare as preparing
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.death import RESUME, fault_of
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.in_flight import Answer, Asked, InFlight, Refusal, RequestRefused, Turn
from sglang_probe.harvest.job import Job, job_of
from sglang_probe.harvest.places import Lost
from sglang_probe.harvest.prepare import prepare
from sglang_probe.harvest.recording import harvest
from sglang_probe.harvest.replica import EngineArguments, Told
from sglang_probe.harvest.replicas import Replicas
from sglang_probe.policy.arm import Arm
from sglang_probe.policy.partners import Partners
from sglang_probe.run import journal
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.verify import verify
from sglang_probe.workload.request import asked_rid
from tests.harvest.test_recording import MadeEngine

FAMILIES, EACH = 4, 5


class MadePlace:
    """A process with a made-up replica. `ends`: what happens at a request, and how often still."""

    def __init__(self, arguments: EngineArguments, ends: Counter[tuple[int, str]]) -> None:
        self._probe, self._ends = arguments.probe, ends
        self._waiting: list[Asked] = []
        self._engine: MadeEngine | None = None
        self.served: list[str] = []

    async def call(self, method: str, *args: Any) -> Told:
        return await getattr(self, f"_{method}")(*args)

    async def _start(self) -> Told:
        if self._probe.start and self._ends[-1, "starts"]:
            self._ends[-1, "starts"] -= 1
            raise Lost("the machine went away")
        await self._begin(self._probe)
        return Told()

    async def _begin(self, probe: EngineProbeConfig) -> Told:
        self._engine = MadeEngine(probe, {}, [])
        if probe.replica == 0:
            (probe.run / ENGINE_FILE).write_text(json.dumps(self._engine.in_force()))
        return Told()

    async def _step(self, more: list[Asked], concurrency: int, _turns: Mapping[str, Turn]) -> Told:
        assert self._engine is not None
        self._waiting += more
        await asyncio.sleep(0)
        if not self._waiting:
            return Told()
        rid, prompt, _ = self._waiting[0]
        number = int(asked_rid(rid)[1:])
        flight = [r for r, _, _ in self._waiting[:concurrency]]
        for how in ("dies", "crashes", "gone", "forgets", "refused"):
            if self._ends[number, how]:
                self._ends[number, how] -= 1
                if how == "refused":
                    self._waiting.pop(0)
                    return Told([Refusal(rid, "too long")], *self._left())
                if how != "forgets":  # what it had answered is durable
                    self._engine._recorder.drain()
                    self._engine._writer.flush(10)
                self._drop()
                if how == "crashes":  # as `Session.crashed`, and what the real engine's `look` makes of it
                    fault = f"{CRASHED}: IndexError: index {number} is out of range"
                    (self._probe.run / fault_file(self._probe.replica)).write_text(fault)
                    return Told(died=True, fault=fault, fix=RESUME, in_flight=flight)
                if how == "dies":
                    return Told(died=True, fault="a process of the engine was killed by SIGKILL", in_flight=flight)
                raise Lost("the actor died")
        if (fault := fault_of(self._probe.run, self._probe.replica)) is not None:
            return Told(fault=fault)
        self._waiting.pop(0)
        self._engine._serve(rid, prompt)
        self.served.append(rid)
        return Told([Answer(rid, [5], 0)], *self._left())

    def _left(self) -> tuple[int, int]:
        return len(self._waiting), min(len(self._waiting), 2)

    async def _close_recording(self) -> Told:
        assert self._engine is not None
        self._engine.close_recording()
        return Told()

    async def _stop(self) -> Told:
        return Told()

    def _drop(self) -> None:
        """What was not written is lost, and the ledger is let go of."""
        writer = self._engine._writer  # type: ignore[union-attr]
        with writer._work:
            writer._error = OSError("killed")
            writer._handed = []
        writer.stop()
        writer._thread.join(10)

    def end(self) -> None:
        if self._engine is not None:
            self._engine.stop()


class MadePlaces:
    def __init__(self, ends: dict[tuple[int, str], int]) -> None:
        self.ends = Counter(ends)
        self.placed: list[tuple[int, MadePlace]] = []
        self.closed = False

    def place(self, rank: int, arguments: EngineArguments) -> MadePlace:
        made = MadePlace(arguments, self.ends)
        self.placed.append((rank, made))
        return made

    def close(self) -> None:
        self.closed = True


class MadeHost(EngineHost):
    def __init__(self, ends: dict[tuple[int, str], int]) -> None:
        super().__init__()
        self.places = MadePlaces(ends)

    def open(
        self,
        model_path: str,
        server: dict[str, Any],
        probe: EngineProbeConfig,
        pool: int | None = None,
        replicas: int = 1,
    ) -> Replicas:
        if isinstance(self._engine, Replicas):
            self._engine.begin(probe)
            return self._engine
        engine = Replicas(model_path, probe, server, replicas, self.places)
        engine.start()
        self._engine = engine
        return engine


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> HarvestConfig:
    file = tmp_path_factory.mktemp("workload") / "requests.jsonl"
    lines = [{"prompt": f"{'abcdefg'[f] * 4}: number {i}"} for i in range(EACH) for f in range(FAMILIES)]
    file.write_text("\n".join(map(json.dumps, lines)))
    fields: dict[str, Any] = {"workload": {"source": "jsonl", "path": file}, "concurrency": 2, "hook_points": []}
    # Parts are written when they are asked for, so that what is not durable is known.
    return HarvestConfig.model_validate({**fields, "replicas": 2, "checkpoint_seconds": 1000})


@pytest.fixture(scope="module")
def job(config: HarvestConfig) -> Job:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "require_ray", lambda: None)
        prepared = prepare(config, {"arm": Arm()})
    return job_of(prepared, "run", prepared.workload.requests, arm=Arm())


def _record(job: Job, path: Path, ends: dict[tuple[int, str], int], **how: bool) -> tuple[Run, MadePlaces, str]:
    said = ""
    with MadeHost(ends) as host:
        try:
            harvest(job, path, host, **how)
        except ProbeError as e:
            said = str(e)
    run = load_run(path)
    assert [str(c) for c in verify(run) if not c.holds] == []
    assert host.places.closed
    return run, host.places, said


def _ended(run: Run) -> list[str]:
    return sorted(map(asked_rid, run.engine_requests()["rid"]))


def _everything(job: Job) -> list[str]:
    return sorted(r.rid for r in job.requests)


def test_each_family_is_served_by_one_replica_and_the_run_is_one(job: Job, tmp_path: Path) -> None:
    run, places, said = _record(job, tmp_path / "run", {})
    assert (said, run.complete, _ended(run)) == ("", True, _everything(job))
    assert set(run.spans()["dp_rank"]) == {0, 1}
    engine_of = {rid: i for i, (_, place) in enumerate(places.placed) for rid in place.served}
    of_family = [{engine_of[r.rid] for r in job.requests[f::FAMILIES]} for f in range(FAMILIES)]
    assert all(len(engines) == 1 for engines in of_family)
    told = run.manifest["replicas"]
    assert (told["count"], told["families"], told["cut"], told["ended"]) == (2, FAMILIES, [], [])
    assert len(run.manifest["starts"]) == 1


@pytest.mark.parametrize("how", ["dies", "crashes", "gone", "forgets"])
def test_a_replica_that_ends_is_started_again_and_nothing_is_lost_or_doubled(
    job: Job, tmp_path: Path, how: str
) -> None:
    """Engines end, their processes end, and their processes end with nothing of what they answered on disk. Both do:
    where one does, the other may have taken its work before it is there again."""
    run, places, said = _record(job, tmp_path / "run", {(4, how): 1, (5, how): 1})
    assert (said, run.complete, _ended(run)) == ("", True, _everything(job))
    assert len(places.placed) > 2
    again = [rid for rid in run.engine_requests()["rid"] if "~" in rid]
    ended = run.manifest["replicas"]["ended"]
    assert sorted(e["replica"] for e in ended) == [0, 1]
    assert sum(e["asked_again"] for e in ended) == len(again) > 0
    assert len(run.manifest["starts"]) == 3
    answered = sum(s["requests"] for s in run.manifest["starts"])
    assert answered == len(job.requests) + (2 if how == "forgets" else 0)


def test_the_fault_of_one_replica_is_no_other_ones_and_does_not_outlive_its_engine(job: Job, tmp_path: Path) -> None:
    run, _, said = _record(job, tmp_path / "run", {(4, "crashes"): 1, (5, "crashes"): 1})
    assert (said, run.complete, _ended(run)) == ("", True, _everything(job))
    assert run.manifest["fault"] is None
    assert {e["reason"] for e in run.manifest["replicas"]["ended"]} == {
        f"{CRASHED}: IndexError: index {i} is out of range" for i in (4, 5)
    }
    assert list(run.path.glob("fault*")) == []


def test_a_replica_that_is_lost_while_it_starts_again_is_started_once_more(job: Job, tmp_path: Path) -> None:
    run, places, said = _record(job, tmp_path / "run", {(4, "gone"): 1, (5, "gone"): 1, (-1, "starts"): 2})
    assert (said, run.complete, _ended(run)) == ("", True, _everything(job))
    assert places.ends[-1, "starts"] == 0
    assert [e["asked_again"] > 0 for e in run.manifest["replicas"]["ended"]].count(False) >= 2


def test_replicas_that_never_start_again_are_given_up(job: Job, tmp_path: Path) -> None:
    run, _, said = _record(job, tmp_path / "run", {(4, "gone"): 1, (5, "gone"): 1, (-1, "starts"): 99})
    assert "answered nothing meanwhile" in said
    assert not run.complete


def test_the_same_engines_make_the_next_recording(job: Job, tmp_path: Path) -> None:
    with MadeHost({(4, "gone"): 1}) as host:
        runs = [harvest(job, tmp_path / name, host) for name in ("first", "second")]
    assert [run.complete for run in runs] == [True, True]
    assert [len(run.manifest["replicas"]["ended"]) for run in runs] == [1, 0]
    for run in runs:
        assert [str(c) for c in verify(run) if not c.holds] == []
        assert _ended(run) == _everything(job)
    assert not any("~" in rid for rid in runs[1].engine_requests()["rid"])


def test_a_request_that_ends_every_engine_is_served_alone_and_then_refused(job: Job, tmp_path: Path) -> None:
    run, places, said = _record(job, tmp_path / "run", {(6, "dies"): 9})
    assert (said, run.complete) == ("", True)
    bad = job.requests[6].rid
    assert list(run.manifest["refused"]) == [bad]
    assert "served alone" in run.manifest["refused"][bad]
    assert _ended(run) == sorted({*_everything(job)} - {bad})
    assert places.ends[6, "dies"] == 6, "in flight, in flight again, alone"


def test_what_sglang_refuses_is_refused_once_whatever_else_ends(job: Job, tmp_path: Path) -> None:
    run, _, said = _record(job, tmp_path / "run", {(2, "refused"): 1, (11, "gone"): 1})
    assert (said, run.complete) == ("", True)
    assert run.manifest["refused"] == {job.requests[2].rid: "too long"}


def test_replicas_that_end_again_and_again_are_given_up_and_another_start_finishes(job: Job, tmp_path: Path) -> None:
    path = tmp_path / "run"
    ends = {(i, "gone"): 9 for i in range(len(job.requests))}
    run, _, said = _record(job, path, ends)
    assert "answered nothing meanwhile" in said
    assert not run.complete
    names = set(run.spans()["rid"])
    run, _, said = _record(job, path, {}, resume=True)
    assert (said, run.complete, _ended(run)) == ("", True, _everything(job))
    assert names.isdisjoint(set(run.engine_requests()["rid"]))


def test_a_name_is_not_given_twice_after_the_command_was_killed(job: Job, tmp_path: Path) -> None:
    """One replica ended, and the other took its requests; the manifest of the killed command knows of neither."""
    path = tmp_path / "run"
    run, _, _ = _record(job, path, {(9, "gone"): 1})
    text = json.loads((path / "manifest.json").read_text())
    text |= {"status": "incomplete", "starts": []}
    text.pop("files")
    (path / "manifest.json").write_text(json.dumps(text))
    again = run.spans().query("rid.str.endswith('~1')")["dp_rank"]  # of either: the one that ended is started again
    (path / journal.name_of(1 - int(again.iloc[0]))).write_text("")
    (path / "seal.json").unlink()
    assert any(rid.endswith("~1") for rid in load_run(path).engine_requests()["rid"])
    run, _, said = _record(job, path, {}, resume=True)
    assert (said, run.complete, _ended(run)) == ("", True, _everything(job))
    names = {rid.partition("~")[2] for rid in run.engine_requests()["rid"]}
    assert {"1", "2"} <= names <= {"", "1", "2"}


def test_what_several_engines_cannot_do_is_refused_before_anything_starts(
    config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "require_ray", lambda: None)
    with pytest.raises(ConfigError, match="`arm` says who shares a batch"):
        prepare(config, {"arm": Arm(partners=Partners(count=1))})
    ranks = config.model_copy(update={"server": {"dp_size": 2}})
    with pytest.raises(ConfigError, match="dp_size"):
        prepare(ranks, {"arm": Arm()})


def test_without_ray_the_error_names_the_extra(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_probe.harvest.on_ray.find_spec", lambda _name: None)
    with pytest.raises(UnsupportedError, match=r"sglang-probe\[ray\]"):
        prepare(config, {"arm": Arm()})


def test_a_request_waits_for_the_one_before_it_and_those_that_can_be_sent_go_by_their_number() -> None:
    class Engine:
        def __init__(self) -> None:
            self.asked: list[str] = []
            self.ends: dict[str, asyncio.Event] = {}

        async def generate(self, rid: str, prompt_ids: Any, sampling_params: Any, _begun: Any = None) -> Answer:
            self.asked.append(rid)
            self.ends[rid] = asyncio.Event()
            await self.ends[rid].wait()
            return Answer(rid, [1], 0)

        def look(self) -> None:
            pass

    async def serve() -> list[list[str]]:
        engine, seen = Engine(), []
        requests = InFlight(engine)
        turns = {"a1": Turn(0), "b1": Turn(1), "a2": Turn(3, "a1"), "b2": Turn(4, "b1"), "c2": Turn(2, "c1")}
        requests.add([(rid, [1], {}) for rid in ("a1", "a2", "b1", "b2")], turns)
        requests._admit(4)
        await asyncio.sleep(0)
        seen.append(list(engine.asked))
        assert (requests.ready, len(requests)) == (2, 4)
        requests.add([("c2~1", [1], {})], turns)  # what it was to wait for is another engine's
        engine.ends["b1"].set()
        assert [a.rid for a in await requests.answered(4)] == ["b1"]
        await asyncio.sleep(0)
        seen.append(list(engine.asked))
        requests.cancel()
        return seen

    first, then = asyncio.run(serve())
    assert first == ["a1", "b1"]
    assert then == ["a1", "b1", "c2~1", "b2"], "a2 waits for a1"


def test_requests_are_admitted_in_order_up_to_the_bound_and_added_ones_come_after() -> None:
    class Engine:
        def __init__(self) -> None:
            self.asked: list[str] = []
            self.most = self.now = 0

        async def generate(self, rid: str, prompt_ids: Any, sampling_params: Any, _begun: Any = None) -> Answer:
            self.asked.append(rid)
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0)
            self.now -= 1
            return Answer(rid, [1], 0)

        def look(self) -> None:
            pass

    async def serve() -> tuple[Engine, list[str]]:
        engine = Engine()
        requests, answered = InFlight(engine), []
        requests.add([(f"a{i}", [1], {}) for i in range(3)])
        answered += [a.rid for a in await requests.answered(2)]
        requests.add([(f"b{i}", [1], {}) for i in range(3)])
        while requests:
            answered += [a.rid for a in await requests.answered(2)]
        return engine, answered

    engine, answered = asyncio.run(serve())
    assert engine.asked == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert sorted(answered) == sorted(engine.asked)
    assert engine.most == 2


def test_a_first_token_is_enough_for_those_that_wait_for_it_alone() -> None:
    class Engine:
        def __init__(self) -> None:
            self.asked: list[str] = []
            self.begun: dict[str, Any] = {}

        async def generate(self, rid: str, prompt_ids: Any, sampling_params: Any, begun: Any = None) -> Answer:
            self.asked.append(rid)
            self.begun[rid] = begun
            await asyncio.Event().wait()
            raise AssertionError("nobody ends it")

        def look(self) -> None:
            pass

    async def serve() -> Engine:
        engine = Engine()
        requests = InFlight(engine)
        turns = {"a1": Turn(0), "a2": Turn(1, "a1", begun=True), "b": Turn(2)}
        requests.add([(rid, [1], {}) for rid in turns], turns)
        requests._admit(3)
        await asyncio.sleep(0)
        assert engine.asked == ["a1", "b"]
        engine.begun["a1"]()
        await asyncio.sleep(0)
        requests.cancel()
        return engine

    engine = asyncio.run(serve())
    assert engine.asked == ["a1", "b", "a2"]
    assert engine.begun["b"] is None, "nobody waits for it, so that it need not be told"


def test_those_that_wait_for_a_request_that_is_refused_wait_for_their_first() -> None:
    class Engine:
        def __init__(self) -> None:
            self.asked: list[str] = []
            self.both: list[list[str]] = []

        async def generate(self, rid: str, prompt_ids: Any, sampling_params: Any, begun: Any = None) -> Answer:
            self.asked.append(rid)
            await asyncio.sleep(0)
            if rid in ("a0", "a1"):
                raise RequestRefused(Refusal(rid, "too long"))
            self.both.append(list(self.asked))
            if begun is not None:
                begun()
            await asyncio.sleep(0)
            return Answer(rid, [], 0)

        def look(self) -> None:
            pass

    async def serve() -> tuple[Engine, list[Answer | Refusal]]:
        engine, answers = Engine(), []
        requests = InFlight(engine)
        names = [f"a{i}" for i in range(5)]
        requests.add([(rid, [1], {}) for rid in names], {n: Turn(int(n[1]), "a0", begun=True) for n in names[1:]})
        while requests:
            answers += await requests.answered(4)
        return engine, answers

    engine, answers = asyncio.run(asyncio.wait_for(serve(), 60))
    assert sorted(a.rid for a in answers) == ["a0", "a1", "a2", "a3", "a4"]
    assert engine.both[0] == ["a0", "a1", "a2"], "one after the other, until one is served"


def test_requests_of_several_families_are_sent_by_their_number_in_the_workload() -> None:
    replicas = Replicas("model", EngineProbeConfig(run=Path("run")), {}, 1, MadePlaces({}))
    replicas._order = "families"
    first = [(f"r{i}", [i % 2] * 40 + [i], {}) for i in range(6)]
    replicas._turns = {rid: Turn(i) for i, (rid, _, _) in enumerate(first)}
    replicas._take_turns(first[1::2])
    assert replicas._turns["r5"] == Turn(5, "r1", begun=True)
    replicas._take_turns(first[3::2])  # r1 is durable, and its engine is gone
    assert replicas._turns["r5"] == Turn(5, "r3", begun=True)
    assert replicas._turns["r3"] == Turn(3)
