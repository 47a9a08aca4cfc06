"""Where engines are placed on Ray, what they are told, what Ray's errors become. What needs Ray skips without it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sglang_probe.errors import ProbeError
from sglang_probe.harvest import on_ray
from sglang_probe.harvest.on_ray import RayPlace, RayPlaces, on_accelerators, passed_on, share, waiting
from sglang_probe.harvest.places import Lost


def test_cores_are_shared_out_so_that_every_engine_fits_on_one_machine() -> None:
    assert share([8], 2) == 4
    assert share([16, 16, 16, 16], 5) == 8
    assert share([16, 16, 16, 16], 3) == 16
    assert share([2], 2) == 1
    assert share([1], 2) == 0


def test_no_secret_leaves_this_process() -> None:
    """What is passed on stands in Ray's dashboard and logs."""
    env = {"HF_TOKEN": "hf_x", "HF_HUB_TOKEN": "hf_x", "HUGGING_FACE_HUB_TOKEN": "hf_x", "SGLANG_API_KEY": "x"}
    assert passed_on({**env, "PATH": "/bin", "SGLANG_PROBE_DEVICE": "cpu", "HF_HOME": "/models"}) == {
        "SGLANG_PROBE_DEVICE": "cpu",
        "HF_HOME": "/models",
    }


def test_engines_run_on_gpus_where_they_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_PROBE_DEVICE", raising=False)
    monkeypatch.setattr(on_ray, "accelerator_present", lambda: False)
    nodes = [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0}]
    assert on_accelerators(nodes, {}, here=False)
    assert not on_accelerators(nodes[:1], {}, here=False)
    assert not on_accelerators(nodes, {"device": "cpu"}, here=False)
    assert not on_accelerators(nodes, {}, here=True)


def test_who_waits_says_for_what() -> None:
    said = waiting("GPU", 2, 30, {"CPU": 5.0, "GPU": 1.0})
    assert said == "waiting for room for 30 s: it needs 2 GPUs on one machine, free are 5 CPUs, 1 GPUs in all"
    assert "has not started for 60 s" in waiting("CPU", 2, 60, {"CPU": 5.0})


@pytest.mark.parametrize(
    "error", ["OutOfMemoryError", "NodeDiedError", "WorkerCrashedError", "LocalRayletDiedError", "RayActorError"]
)
def test_whatever_ray_says_of_a_process_is_that_it_is_lost(error: str) -> None:
    exceptions = pytest.importorskip("ray.exceptions")
    kind = getattr(exceptions, error)
    raised = kind("no memory left\nand a long story") if error in ("OutOfMemoryError", "NodeDiedError") else kind()

    class Method:
        async def remote(self, *_args: Any) -> Any:
            raise raised

    class Actor:
        step = Method()
        __ray_ready__ = Method()

    for there in (True, False):
        place = RayPlace(Actor(), "replica 1", "CPU", 1)
        place._there = there
        with pytest.raises(Lost) as lost:
            asyncio.run(place.call("step"))
        assert str(lost.value)
        assert "\n" not in str(lost.value)


def test_a_cluster_that_does_not_answer_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def init(*_where: str, **_how: Any) -> None:
        raise ConnectionError("nobody is there")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ProbeError, match=r"RAY_ADDRESS=127\.0\.0\.1:1: nobody is there\n.*ray status"):
        RayPlaces(2, {})
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ProbeError, match="Ray does not start on this machine: nobody is there"):
        RayPlaces(2, {})
