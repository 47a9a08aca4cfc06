"""Starts and drives a real SGLang engine with the probe installed. The only file outside hooks/ that imports it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.errors import ProbeError
from sglang_probe.hooks.config import EngineProbeConfig
from sglang_probe.hooks.control import CLOSE
from sglang_probe.platform.environment import accelerator_present, bind_cpus, prepare_this_process
from sglang_probe.plugin import CONFIG_VARIABLE

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
    # The pool is sized from free memory otherwise, which on a shared CPU machine is neither small nor repeatable.
    return {"device": "cpu", "attention_backend": "torch_native", "max_total_tokens": 65536}


def server_argument_names() -> set[str]:
    """Names that SGLang accepts as server arguments."""
    prepare_this_process()
    from sglang.srt.server_args import ServerArgs

    return set(ServerArgs.__struct_fields__)


def sampling_parameter_names() -> set[str]:
    """Names that SGLang accepts as sampling parameters."""
    prepare_this_process()
    from sglang.srt.sampling.sampling_params import SamplingParams

    return set(SamplingParams.__struct_fields__)


class ProbedEngine:
    """A running engine. Use as a context manager; leaving it closes the recording and ends the engine's processes.

    Args:
        model_path: what SGLang loads.
        probe: the engine-side configuration, written to the run directory as `probe.yaml`.
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

    def __enter__(self) -> ProbedEngine:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the engine's processes; returns when it can serve."""
        path = self._probe.run / PROBE_FILE
        # JSON is YAML; the file is what the scheduler process reads.
        path.write_text(json.dumps(self._probe.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        prepare_this_process()
        # Loading bars and import-time warnings of every process would bury our own progress.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        os.environ[CONFIG_VARIABLE] = str(path.resolve())
        ranks = int(self._server.get("tp_size", 1)) * int(self._server.get("dp_size", 1))
        bind_cpus(os.environ, ranks)
        import sglang

        self._engine = sglang.Engine(**self._server)

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

    @property
    def server_args(self) -> dict[str, Any]:
        """The resolved server arguments, as plain data."""
        import msgspec

        return dict(json.loads(json.dumps(msgspec.structs.asdict(self._engine.server_args), default=str)))

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

    def close_recording(self, timeout: float = 120) -> None:
        """Have the probe write everything it knows.

        Raises:
            ProbeError: the probe had stopped recording, or does not answer.
        """
        from sglang.srt.managers.io_struct import SetInternalStateReq

        async def close() -> list[bool]:
            request = SetInternalStateReq(server_args={CLOSE: 1})
            return list(await asyncio.wait_for(self._engine.tokenizer_manager.set_internal_state(request), timeout))

        try:
            replies = self.run(close())
        except TimeoutError:
            raise ProbeError(f"the engine did not confirm within {timeout} s that the recording is on disk") from None
        if not all(replies):
            raise ProbeError(fault_of(self._probe.run) or "the engine refused to close the recording")


def fault_of(run: Path) -> str | None:
    """Why the probe stopped recording, if it did."""
    from sglang_probe.hooks.session import FAULT_FILE

    path = run / FAULT_FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else None
