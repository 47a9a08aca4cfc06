"""The endpoints' answers, with a made-up scheduler behind them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.engine.hooks import http
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.http import Endpoints, libraries_of
from sglang_probe.engine.hooks.install import _serves_http
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.steering.config import SteerConfig
from tests.small_cache import SmallCache
from tests.steering.test_library import add

STATE = {
    "recording": True,
    "reason": None,
    "positions": {"computed": 30, "reused": 10},
    "requests": 3,
    "recent": [{"rid": str(i)} for i in range(50)],
    "flush": {"asked": 1, "done": 0, "segment": "s0"},
    "segment": {"path": "s1"},
}


def _endpoints(states: list[Any], agrees: bool = True, idle: bool = True) -> Endpoints:
    """Answers `states` in turn, the last one for ever."""

    async def get() -> list[dict[str, Any]]:
        return [{"probe": states.pop(0) if len(states) > 1 else states[0]}]

    async def close() -> list[bool]:
        return [agrees]

    async def empty(_timeout: float) -> bool:
        return idle

    return Endpoints(get, close, empty)


def test_vectors_are_listed_without_their_tensors(tmp_path: Path) -> None:
    vector = add(tmp_path, "formal", evidence={"held_out_auc": {"estimate": 0.9}})
    config = EngineProbeConfig(run=tmp_path, asks=["steer"], steer=SteerConfig(library=tmp_path))
    libraries = libraries_of(config)
    loaded = {**STATE, "libraries": {"steer": libraries["steer"].hash}}

    def ask(*states: dict[str, Any]) -> Any:
        endpoints = _endpoints([*states])
        endpoints._libraries = libraries
        return asyncio.run(endpoints.vectors())

    out = json.loads(json.dumps(ask(loaded)))
    assert out["steer"]["library"] == loaded["libraries"]["steer"]
    (card,) = out["steer"]["vectors"]
    assert (card["name"], card["hash"], card["evidence"]) == ("formal", vector.hash, vector.card.evidence)
    assert not any(isinstance(value, list) for value in card.values())
    other = ask({**STATE, "libraries": {"steer": "0" * 64}})
    assert (other.status_code, b"was changed while the server started" in other.body) == (503, True)
    assert asyncio.run(_endpoints([STATE]).vectors()) == {}


def test_where_there_is_an_admin_key_other_clients_learn_no_ids_of_requests() -> None:
    event = {"evidence": {"rid": "theirs", "of": "hook"}, "last": [{"rid": "theirs", "p": 0.5}]}
    monitor = {"requests": 1, "alerts": [{"alert": "request", "rid": "theirs", "score": 9.0}], "events": [event]}
    state = {**STATE, "recent": [{"rid": "theirs", "prompt": 7}], "monitor": monitor}
    endpoints = _endpoints([state, {**state, "dp_rank": 1}])
    endpoints._ids = False
    for shown, named in ((endpoints.coverage, endpoints.coverage_by_id), (endpoints.alerts, endpoints.alerts_by_id)):
        assert "theirs" not in json.dumps(asyncio.run(shown()))  # type: ignore[operator]
        assert "theirs" in json.dumps(asyncio.run(named()))  # type: ignore[operator]
    assert asyncio.run(endpoints.coverage())["recent"][0]["prompt"] == 7
    endpoints._ids = True  # nobody but the admin, or everybody, may ask
    assert "theirs" in json.dumps(asyncio.run(endpoints.alerts()))


def test_coverage_lists_as_many_requests_as_asked() -> None:
    out = asyncio.run(_endpoints([STATE]).coverage(n=2))
    assert [r["rid"] for r in out["recent"]] == ["0", "1"]
    assert out["prompt_reused_fraction"] == 0.25


def test_flush_waits_until_the_segment_is_on_disk() -> None:
    done = {**STATE, "flush": {"asked": 1, "done": 1, "segment": "s0"}}
    out = asyncio.run(_endpoints([STATE, STATE, done]).flush())
    assert out == {"flushed": True, "closed": True, "segment": "s0", "next": "s1"}


def test_a_flush_of_nothing_says_so() -> None:
    done = {**STATE, "flush": {"asked": 1, "done": 1, "segment": "s0", "nothing_new": True}}
    out = asyncio.run(_endpoints([done]).flush())
    assert (out["closed"], "nothing was recorded" in out["reason"]) == (False, True)


def test_coverage_and_flush_say_that_nothing_is_recorded_like_status() -> None:
    stopped = {**STATE, "recording": False, "reason": "the disk", "tries_again_in": 3.0}
    for out in (asyncio.run(_endpoints([stopped]).coverage()), asyncio.run(_endpoints([stopped]).status())):
        assert (out["recording"], out["reason"], out["tries_again_in"]) == (False, "the disk", 3.0)
    refused = asyncio.run(_endpoints([stopped], agrees=False).flush())
    assert json.loads(refused.body) == {
        "flushed": False,
        "recording": False,
        "reason": "the disk",
        "tries_again_in": 3.0,
    }


def test_a_cache_that_is_in_use_is_not_flushed_and_the_segment_goes_on() -> None:
    out = asyncio.run(_endpoints([STATE], idle=False).flush(cache=True))
    assert (out.status_code, b"in flight" in out.body) == (409, True)


def test_flush_says_why_when_nothing_is_recorded() -> None:
    out = asyncio.run(_endpoints([{"recording": False, "reason": "the disk"}], agrees=False).flush())
    assert (out.status_code, b"the disk" in out.body) == (503, True)


def test_flush_gives_up_when_the_disk_does_not_finish(monkeypatch: Any) -> None:
    monkeypatch.setattr(http, "_FLUSH_SECONDS", 0.1)
    assert asyncio.run(_endpoints([STATE]).flush()).status_code == 504


def test_a_scheduler_without_the_probe_is_not_an_error() -> None:
    status = asyncio.run(_endpoints([None]).status())
    assert status["recording"] is False
    coverage = asyncio.run(_endpoints([None]).coverage())
    assert coverage["prompt_reused_fraction"] is None


def test_routes_are_added_only_where_http_is_served() -> None:
    scheduler, detokenizer = "sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager"
    assert _serves_http({"sglang.srt.plugins"})  # launch_server loads plugins first
    assert _serves_http({scheduler, detokenizer, "sglang.srt.entrypoints.http_server"})  # an embedding script
    assert not _serves_http({scheduler})
    assert not _serves_http({detokenizer})


def _asked(path: Path, **asked: Any) -> Any:
    state = {**STATE, "privacy": "ids", "segment": {"path": str(path)}}
    return asyncio.run(_endpoints([state]).why(**asked))


def test_causes_are_told_of_the_segment_and_of_one_request_without_anything_of_a_prompt(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "segment-00000")
    cache.serve("a", [*range(500, 540)], labels={"session": "s-1"})
    cache.serve("b", [7, *range(500, 540)], labels={"session": "s-2"})
    cache.close()
    file = tmp_path / "segment-00000" / MANIFEST
    segment = {"number": 0, "first_of_process": True, "carried_in": {}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "segment": segment}))
    told = _asked(file.parent)
    assert (told["recording"], told["computed"]) == (True, 81)
    assert sum(told["causes"].values()) == 81
    assert {g["group"]: g["causes"] for g in told["groups"]}["s-2"]["diverged"] == 40
    of_one = _asked(file.parent, rid="b")
    assert [(p["start"], p["end"], p["cause"]) for p in of_one["positions"]][-1] == (1, 41, "diverged")
    assert "5" * 3 not in json.dumps(of_one)
    nobody = _asked(file.parent, rid="nobody")
    assert (nobody.status_code, b"no prompt of" in nobody.body) == (404, True)


def test_causes_need_prompts_and_a_recording(tmp_path: Path) -> None:
    none = asyncio.run(_endpoints([{**STATE, "privacy": "none"}]).why())
    assert (none.status_code, b"privacy: hashes" in none.body) == (404, True)
    stopped = {"recording": False, "reason": "the disk is full", "tries_again_in": 3}
    assert asyncio.run(_endpoints([stopped]).why()).status_code == 503


def test_an_answer_on_causes_is_given_again_and_questions_wait_for_each_other(tmp_path: Path) -> None:
    endpoints = _endpoints([{**STATE, "privacy": "ids", "segment": {"path": str(tmp_path / "segment-00000")}}])

    async def ask() -> list[Any]:
        return list(await asyncio.gather(*(endpoints.why() for _ in range(3))))

    answers = asyncio.run(ask())
    assert {a.status_code for a in answers} == {404}
    assert len(endpoints._why) == 1


def test_few_questions_on_causes_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def slow(question: dict[str, Any]) -> dict[str, Any]:
        asked.append(question["rid"])
        await released.wait()
        return {"causes": {}}

    async def ask() -> None:
        endpoints = _endpoints([{**STATE, "privacy": "ids", "segment": {"path": str(tmp_path / "segment-00000")}}])
        waiting = [asyncio.ensure_future(endpoints.why(rid=f"{i}")) for i in range(http._WHY_WAITING)]
        while endpoints._why_waiting < http._WHY_WAITING:
            await asyncio.sleep(0)
        assert (await endpoints.why(rid="one more")).status_code == 429
        released.set()
        assert [a["causes"] for a in await asyncio.gather(*waiting)] == [{}] * http._WHY_WAITING
        assert (await endpoints.why(rid="one more"))["causes"] == {}

    monkeypatch.setattr(http, "_causes_of", slow)
    released = asyncio.Event()
    asyncio.run(ask())
    assert len(asked) == http._WHY_WAITING + 1
