"""Starts and drives a real SGLang engine with the probe installed. The only file outside hooks/ that imports it."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
import typing
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.engine.hooks.config import CONFIG_VARIABLE, EngineProbeConfig
from sglang_probe.engine.hooks.control import CLOSE, OPEN
from sglang_probe.engine.platform.defaults import cpu_defaults
from sglang_probe.engine.platform.environment import accelerator_present, bind_cpus, prepare_this_process
from sglang_probe.engine.releases import release
from sglang_probe.errors import ProbeError

PROBE_FILE = "probe.yaml"


@dataclass(frozen=True)
class Answer:
    """One finished request as the engine reports it."""

    rid: str
    output_ids: list[int]
    cached_tokens: int


def default_server_args() -> dict[str, Any]:
    """Arguments that a user would otherwise have to know on a machine without an accelerator."""
    if accelerator_present():
        return {}
    return {"device": "cpu", **cpu_defaults()}


def server_argument_names() -> set[str]:
    """Names that SGLang accepts as server arguments."""
    prepare_this_process()
    from sglang.srt.server_args import ServerArgs

    return release().argument_names(ServerArgs)


def server_argument_choices() -> dict[str, list[Any]]:
    """Values that SGLang accepts, for the server arguments that have a fixed set of them."""
    prepare_this_process()
    from sglang.srt.server_args import ServerArgs

    choices = {}
    for name, hint in typing.get_type_hints(ServerArgs, include_extras=True).items():
        for extra in getattr(hint, "__metadata__", ()):
            if getattr(extra, "choices", None):
                choices[name] = list(extra.choices)
    return choices


def sampling_parameter_names() -> set[str]:
    """Names that SGLang accepts as sampling parameters."""
    prepare_this_process()
    from sglang.srt.sampling.sampling_params import SamplingParams

    return set(SamplingParams.__struct_fields__)


class ProbedEngine:
    """A running engine. Use as a context manager; leaving it closes the recording and ends the engine's processes.

    One engine may make several recordings, one after the other (`begin`).

    Args:
        model_path: what SGLang loads.
        probe: the engine-side configuration of the first recording. Its hooks stay for all that follow.
        server: SGLang server arguments over the defaults.
    """

    def __init__(self, model_path: str, probe: EngineProbeConfig, server: dict[str, Any]) -> None:
        self._probe = probe
        self._server = {
            "model_path": model_path,
            "log_level": "error",
            "random_seed": 0,
            **default_server_args(),
            **server,
        }
        self._engine: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._recordings = 0

    def __enter__(self) -> ProbedEngine:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the engine's processes; returns when it can serve."""
        self._folder = tempfile.TemporaryDirectory(prefix="sglang-probe-")
        path = self._write_config(self._probe)
        prepare_this_process()
        # Loading bars and import-time warnings of every process would bury our own progress.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        os.environ[CONFIG_VARIABLE] = str(path.resolve())
        ranks = int(self._server.get("tp_size", 1)) * int(self._server.get("dp_size", 1))
        bind_cpus(os.environ, ranks)
        import sglang

        self._engine = sglang.Engine(**self._server)

    def _write_config(self, probe: EngineProbeConfig) -> Path:
        """Write what the scheduler process reads, and a copy into the run. JSON is YAML."""
        assert self._folder is not None
        text = json.dumps(probe.model_dump(mode="json"), indent=2) + "\n"
        (probe.run / PROBE_FILE).write_text(text, encoding="utf-8")
        path = Path(self._folder.name) / f"probe-{self._recordings}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    def begin(self, probe: EngineProbeConfig, timeout: float = 60) -> None:
        """Begin another recording in the running engine, under the policy that `probe.switches` names.

        Raises:
            ProbeError: the engine refuses; its log says why.
        """
        self._recordings += 1
        self._write_config(probe)
        deadline = time.monotonic() + timeout
        while not all(self._tell(OPEN, self._recordings, timeout)):  # it may still be busy with the last discarded step
            if time.monotonic() > deadline:
                raise ProbeError("the engine refused to begin another recording; its log says why")
            time.sleep(0.2)
        self._probe = probe

    def stop(self) -> None:
        """Close the recording, if that was not done, and end the engine's processes."""
        try:
            # A failed recording is seen by the caller as parts that are missing; shutting down comes first.
            with suppress(Exception):
                self.close_recording(timeout=20)
        finally:
            os.environ.pop(CONFIG_VARIABLE, None)
            self._engine.shutdown()
            self._engine = None
            if self._folder is not None:
                self._folder.cleanup()

    @property
    def server_args(self) -> dict[str, Any]:
        """The resolved server arguments, as plain data."""
        return dict(json.loads(json.dumps(release().arguments(self._engine.server_args), default=str)))

    def run(self, main: Any) -> Any:
        """Run a coroutine on the engine's event loop."""
        return self._engine.loop.run_until_complete(main)

    async def generate(self, rid: str, prompt_ids: Sequence[int], sampling_params: dict[str, Any]) -> Answer:
        """Serve one request and wait for its end.

        Raises:
            ProbeError: SGLang refuses it.
        """
        try:
            out = await self._engine.async_generate(
                input_ids=list(prompt_ids), sampling_params=sampling_params, rid=rid, stream=False
            )
        except ValueError as e:
            raise ProbeError(f"SGLang refuses request {rid}: {e}") from e
        return Answer(rid, list(out["output_ids"]), int(out["meta_info"]["cached_tokens"]))

    async def serve(
        self, requests: Sequence[tuple[str, Sequence[int], dict[str, Any]]], concurrency: int
    ) -> AsyncIterator[Answer]:
        """Serve requests in order with at most `concurrency` in flight; answers come as they finish."""
        waiting = iter(requests)
        running: set[asyncio.Task[Answer]] = set()

        def admit() -> None:
            while len(running) < concurrency and (r := next(waiting, None)) is not None:
                running.add(asyncio.ensure_future(self.generate(*r)))

        admit()
        try:
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                admit()
                for task in done:
                    yield task.result()
        finally:
            for task in running:
                task.cancel()

    async def serve_groups(
        self, groups: Sequence[Sequence[tuple[str, Sequence[int], dict[str, Any]]]]
    ) -> AsyncIterator[Answer]:
        """Serve groups of requests one after the other, those of a group together; answers come as they finish."""
        for group in groups:
            async for answer in self.serve(group, len(group)):
                yield answer

    def close_recording(self, timeout: float = 120) -> None:
        """Have the probe write everything it knows.

        Raises:
            ProbeError: the probe had stopped recording, or does not answer.
        """
        try:
            replies = self._tell(CLOSE, 1, timeout)
        except TimeoutError:
            raise ProbeError(f"the engine did not confirm within {timeout} s that the recording is on disk") from None
        if not all(replies):
            raise ProbeError(fault_of(self._probe.run) or "the engine refused to close the recording")

    def _tell(self, command: str, value: int, timeout: float) -> list[bool]:
        """Send a command to every data-parallel rank (`sglang_probe.engine.hooks.control`)."""
        from sglang.srt.managers.io_struct import SetInternalStateReq

        async def tell() -> list[bool]:
            request = SetInternalStateReq(server_args={command: value})
            return list(await asyncio.wait_for(self._engine.tokenizer_manager.set_internal_state(request), timeout))

        replies: list[bool] = self.run(tell())
        return replies


def fault_of(run: Path) -> str | None:
    """Why the probe stopped recording, if it did."""
    from sglang_probe.engine.hooks.config import FAULT_FILE

    path = run / FAULT_FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else None
