"""Replicas as actors of Ray: one actor an engine, placed where its GPUs or cores are free.

SGLang's own actors (`sglang/srt/ray`) are one of each rank *within* an engine: they ask for a GPU each, and an engine
does not outlive one of them. Here an actor is the owner of a whole engine, whose ranks are processes of its own on its
machine; so that it runs on a CPU too, and that another can take its place.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from sglang_probe.engine.platform.environment import accelerator_present, cpu_chosen
from sglang_probe.errors import ConfigError, ProbeError, UnsupportedError
from sglang_probe.harvest.places import Lost
from sglang_probe.harvest.replica import EngineArguments, Replica, Told

logger = logging.getLogger("sglang_probe")

_OBJECTS = 100 << 20
"""Bytes of Ray's object store on this machine, where we start it: requests and answers are small."""
_HERE = "127.0.0.1"
_ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray (`_private/services.py`) takes 127.0.0.1 for the address of this machine, on which all its processes then listen,
where clusters are switched off by this variable. `_node_ip_address="127.0.0.1"` it turns into the machine's own."""
_PASSED_ON = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_MODULES_CACHE", "TRANSFORMERS_OFFLINE")
_SECRET = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD", "_CREDENTIALS")
_SAY_SECONDS = 30.0
"""Between two words on a process that has not started yet."""


class RayPlaces:
    """Processes of a Ray cluster: the one that `RAY_ADDRESS` names or that this process is connected to, or else this
    machine, where nothing of it can be reached from outside.

    Args:
        count: engines that will run at once. server: their SGLang server arguments.

    Raises:
        UnsupportedError: Ray is not installed. ConfigError: the cluster has no room for so many engines.
        ProbeError: Ray does not start, or the cluster does not answer.
    """

    def __init__(self, count: int, server: Mapping[str, Any]) -> None:
        ray = _ray()
        self._ours = not ray.is_initialized()
        elsewhere = bool(os.environ.get("RAY_ADDRESS"))
        os.environ.setdefault("TQDM_DISABLE", "1")  # loading bars of the engines would bury our own progress
        if self._ours:
            _connect() if elsewhere else _start(max(count, len(os.sched_getaffinity(0))))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        ranks = int(server.get("tp_size") or 1)
        kind, each = "CPU", 1
        if on_accelerators(nodes, server, here=self._ours and not elsewhere):
            kind, each = "GPU", ranks
        elif fits := share([int(n.get("CPU", 0)) for n in nodes], count):
            each = fits
        if sum(int(node.get(kind, 0)) // each for node in nodes) < count:
            self.close()
            raise ConfigError(
                f"`replicas: {count}`: the Ray cluster has no room for so many engines of {each} {kind}s each",
                fix="lower `replicas` or `server: {tp_size: ...}`, or start more Ray nodes",
            )
        self._kind, self._each = kind, each

    def place(self, rank: int, arguments: EngineArguments) -> RayPlace:
        """As `Places.place`."""
        resources = {"num_gpus": self._each, "num_cpus": 1} if self._kind == "GPU" else {"num_cpus": self._each}
        with _losses():
            actor = _ray().remote(Replica).options(**resources, max_restarts=0, scheduling_strategy="SPREAD")
            return RayPlace(actor.remote(arguments), f"replica {rank}", self._kind, self._each)

    def close(self) -> None:
        """End Ray, where it was started here."""
        if self._ours:
            _ray().shutdown()


class RayPlace:
    """An actor of Ray, which needs so many GPUs or cores."""

    def __init__(self, actor: Any, name: str, kind: str, each: int) -> None:
        self._actor, self._name, self._kind, self._each = actor, name, kind, each
        self._there = False

    async def call(self, method: str, *args: Any) -> Told:
        """As `Place.call`."""
        with _losses():
            if not self._there:
                await self._arrive()
            told: Told = await getattr(self._actor, method).remote(*args)
        return told

    async def _arrive(self) -> None:
        """Wait for the process, and say what is missing while it does not come."""
        ready, seconds = asyncio.ensure_future(_awaited(self._actor.__ray_ready__.remote())), 0.0
        try:
            while not (await asyncio.wait([ready], timeout=_SAY_SECONDS))[0]:
                seconds += _SAY_SECONDS
                logger.warning("%s: %s", self._name, waiting(self._kind, self._each, seconds, _free()))
            await ready
        finally:
            ready.cancel()
        self._there = True

    def end(self) -> None:
        """As `Place.end`. SGLang's processes end with the one that started them."""
        from ray.exceptions import RayError

        try:
            _ray().kill(self._actor)
        except RayError as e:  # Ray itself ended, and its processes with it
            logger.debug("%s: %s", self._name, e)


async def _awaited(reference: Any) -> Any:
    return await reference


def _free() -> dict[str, float]:
    return {name: n for name, n in _ray().available_resources().items() if name in ("CPU", "GPU")}


def waiting(kind: str, each: int, seconds: float, free: Mapping[str, float]) -> str:
    """What a replica waits for that has no process after so many seconds."""
    there = ", ".join(f"{free.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
    if free.get(kind, 0) < each:
        return f"waiting for room for {seconds:g} s: it needs {each} {kind}s on one machine, free are {there} in all"
    return f"its process has not started for {seconds:g} s; free are {there} in all (`ray status` says more)"


def on_accelerators(nodes: Sequence[Mapping[str, float]], server: Mapping[str, Any], *, here: bool) -> bool:
    """Whether engines run on GPUs: where they are placed, and not where this command runs, if that is elsewhere.

    Args:
        nodes: resources of the machines, as Ray counts them. server: `device: cpu` says no, as `SGLANG_PROBE_DEVICE`.
        here: there is only this machine.
    """
    if cpu_chosen() or server.get("device") == "cpu":
        return False
    return accelerator_present() if here else any(node.get("GPU") for node in nodes)


@contextmanager
def _losses() -> Iterator[None]:
    """Whatever Ray says of a process, its machine or itself is that the process is lost: no memory, no machine, no
    answer. An exception of our own code in it is passed on."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError:
        raise
    except RayError as e:
        said = str(e).strip() or type(e).__name__
        raise Lost(said.splitlines()[0]) from e


def _connect() -> None:
    """Connect to the cluster that `RAY_ADDRESS` names; its workers have an environment of their own."""
    try:
        env = passed_on(os.environ)
        _ray().init(logging_level="ERROR", runtime_env={"env_vars": env})
    except Exception as e:  # of Ray, of its address, of the network, of its token: each has a type of its own
        raise ProbeError(
            f"no connection to the Ray cluster of RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {e}",
            fix="see that `ray status` answers here, with the same version of Ray, or unset RAY_ADDRESS to run all "
            "replicas on this machine",
        ) from e


def _start(cpus: int) -> None:
    """Start Ray on this machine, where it listens on 127.0.0.1 alone."""
    ray = _ray()
    from ray._private import ray_constants

    before, clusters = os.environ.get(_ALONE), ray_constants.ENABLE_RAY_CLUSTER
    # The variable for Ray's processes, the constant for this one, which may have imported Ray before.
    os.environ[_ALONE], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        # `local`: not the one that somebody else started on this machine.
        ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=_OBJECTS, logging_level="ERROR")
    except Exception as e:
        raise ProbeError(
            f"Ray does not start on this machine: {e}",
            fix="see the newest folder of Ray's logs (`/tmp/ray/session_latest/logs`), or leave out `replicas`",
        ) from e
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        if before is None:
            del os.environ[_ALONE]
        else:
            os.environ[_ALONE] = before
    if any(node["NodeManagerAddress"] != _HERE for node in ray.nodes()):
        ray.shutdown()
        raise UnsupportedError(
            f"Ray {ray.__version__} would listen on addresses other than {_HERE}, and who reaches it can run code",
            fix="install another release of Ray, or start one yourself and name it in RAY_ADDRESS",
        )


def share(cores: Sequence[int], count: int) -> int:
    """Cores for each of `count` engines, as many as possible, on machines with so many cores; 0: there are too few."""
    return next((n for n in range(max(cores, default=0), 0, -1) if sum(c // n for c in cores) >= count), 0)


def passed_on(env: Mapping[str, str]) -> dict[str, str]:
    """Variables that engines on other machines get. Ray shows them in its dashboard and its logs: no secrets."""
    ours = (name for name in env if name.startswith("SGLANG") and not name.endswith(_SECRET))
    return {name: env[name] for name in (*ours, *(n for n in _PASSED_ON if n in env))}


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
