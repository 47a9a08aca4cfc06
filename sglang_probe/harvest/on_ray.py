"""Replicas as actors of Ray: one actor an engine, placed where its GPUs or cores are free.

SGLang's own actors (`sglang/srt/ray`) are one of each rank *within* an engine: they ask for a GPU each, and an engine
does not outlive one of them. Here an actor is the owner of a whole engine, whose ranks are processes of its own on its
machine; so that it runs on a CPU too, and that another can take its place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from sglang_probe.engine.platform.environment import accelerator_present
from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.harvest.replica import EngineArguments, Replica, Told
from sglang_probe.harvest.replicas import Lost

_OBJECTS = 100 << 20
"""Bytes of Ray's object store on this machine, where we start it: requests and answers are small."""


class RayPlaces:
    """Processes of a Ray cluster: the one that `RAY_ADDRESS` names or that this process is connected to, or else this
    machine.

    Args:
        count: engines that will run at once. server: their SGLang server arguments.

    Raises:
        UnsupportedError: Ray is not installed. ConfigError: the cluster has no room for so many engines.
    """

    def __init__(self, count: int, server: Mapping[str, Any]) -> None:
        ray = _ray()
        self._ours = not ray.is_initialized()
        elsewhere = bool(os.environ.get("RAY_ADDRESS"))
        os.environ.setdefault("TQDM_DISABLE", "1")  # loading bars of the engines would bury our own progress
        if self._ours:
            quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR"}
            if elsewhere:  # the workers there have an environment of their own
                quiet = {"logging_level": "ERROR", "runtime_env": {"env_vars": _passed_on(os.environ)}}
            else:
                quiet |= {"num_cpus": max(count, len(os.sched_getaffinity(0))), "object_store_memory": _OBJECTS}
            ray.init(**quiet)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        ranks = int(server.get("tp_size") or 1)
        kind, each = "CPU", 1
        if accelerator_present():
            kind, each = "GPU", ranks
        elif fits := share([int(n.get("CPU", 0)) for n in nodes], count):
            each = fits
        if sum(int(node.get(kind, 0)) // each for node in nodes) < count:
            self.close()
            raise ConfigError(
                f"`replicas: {count}`: the Ray cluster has no room for so many engines of {each} {kind}s each",
                fix="lower `replicas` or `server: {tp_size: ...}`, or start more Ray nodes",
            )
        self._resources = {"num_gpus": each, "num_cpus": 1} if kind == "GPU" else {"num_cpus": each}

    def place(self, rank: int, arguments: EngineArguments) -> RayPlace:
        """A process with a replica in it. It is not started again by itself: who asked for it decides what it does."""
        actor = _ray().remote(Replica).options(**self._resources, max_restarts=0, scheduling_strategy="SPREAD")
        return RayPlace(actor.remote(arguments))

    def close(self) -> None:
        """End Ray, where it was started here."""
        if self._ours:
            _ray().shutdown()


class RayPlace:
    """An actor of Ray."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def call(self, method: str, *args: Any) -> Told:
        """As `Place.call`."""
        from ray.exceptions import RayActorError

        try:
            told: Told = await getattr(self._actor, method).remote(*args)
        except RayActorError as e:
            raise Lost(str(e).strip().splitlines()[0]) from e
        return told

    def end(self) -> None:
        """As `Place.end`. SGLang's processes end with the one that started them."""
        _ray().kill(self._actor)


def share(cores: Sequence[int], count: int) -> int:
    """Cores for each of `count` engines, as many as possible, on machines with so many cores; 0: there are too few."""
    return next((n for n in range(max(cores, default=0), 0, -1) if sum(c // n for c in cores) >= count), 0)


def _passed_on(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(("SGLANG", "HF_"))}


def require_ray() -> None:
    """Refuse where Ray is not installed; it is not loaded.

    Raises:
        UnsupportedError: names the extra.
    """
    if find_spec("ray") is None:
        raise UnsupportedError("`replicas` need the package `ray`", fix="pip install 'sglang-probe[ray]'")


def _ray() -> Any:
    require_ray()
    import ray

    return ray
