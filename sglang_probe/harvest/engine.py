"""Starts and drives a real SGLang engine with the probe installed. The only file outside hooks/ that imports it."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import tempfile
import time
import typing
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sglang_probe.engine.hooks.config import CONFIG_VARIABLE, ENGINE_FILE, EngineProbeConfig, fault_file
from sglang_probe.engine.hooks.control import CLOSE, OPEN
from sglang_probe.engine.platform.defaults import cpu_defaults, watchdog_seconds
from sglang_probe.engine.platform.environment import accelerator_present, bind_cpus, prepare_this_process
from sglang_probe.engine.releases import release
from sglang_probe.errors import ProbeError
from sglang_probe.harvest.death import RESUME, Children, EngineDied, crashed, fault_of
from sglang_probe.harvest.families import Order, turns_by_families
from sglang_probe.harvest.in_flight import (
    LOOK_SECONDS,
    Answer,
    Asked,
    InFlight,
    Refusal,
    RequestRefused,
    Turn,
    last_of,
    words_of,
)
from sglang_probe.harvest.signals import EngineSignals

PROBE_FILE = "probe.yaml"


def default_server_args() -> dict[str, Any]:
    """Arguments that a user would otherwise have to know on a machine without an accelerator."""
    if accelerator_present():
        return {}
    # A scheduler without requests spins otherwise, on a core that other processes of the harvest could use.
    return {"device": "cpu", "sleep_on_idle": True, **cpu_defaults()}


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


def verify_sampling(values: Mapping[str, Any], vocabulary: int, tokenizer: Any) -> str | None:
    """What SGLang has against sampling values, by the types that it declares and by its own checks, in its order
    (`TokenizerManager._create_tokenized_object`); None: nothing.

    Args:
        values: known parameters, without `custom_params`.
    """
    prepare_this_process()
    import msgspec
    from sglang.srt.sampling.sampling_params import SamplingParams

    types = typing.get_type_hints(SamplingParams)
    for name, value in values.items():
        if value is None or name == "watermark":
            continue
        try:
            msgspec.convert(value, types[name])
        except (msgspec.ValidationError, TypeError) as e:
            return f"`{name}: {value!r}`: {e}"
    try:
        params = SamplingParams(**values)
        params.normalize(tokenizer)
        params.verify(vocabulary)
    except Exception as e:  # a broken `stop_regex` is an error of `re`, a strange value of anything
        return str(e) or type(e).__name__
    return None


class ProbedEngine:
    """A running engine. Use as a context manager; leaving it closes the recording and ends the engine's processes.

    One engine may make several recordings, one after the other (`begin`). Several engines that make one together are
    `sglang_probe.harvest.replicas.Replicas`.

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
        if "watchdog_timeout" not in server and not accelerator_present():
            self._server["watchdog_timeout"] = watchdog_seconds(Path(model_path), self._server)
        self._engine: Any = None
        self._signals = EngineSignals()
        self._children = Children()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._recordings = 0
        self.restarts = 0
        """Engines that took the place of this one: none does."""
        self._in_flight: dict[str, None] = {}
        """Requests that were sent and have not ended, oldest first."""

    def __enter__(self) -> ProbedEngine:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the engine's processes; returns when it can serve.

        Raises:
            ValueError, TypeError: SGLang refuses an argument. EngineDied: one of its processes ended.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="sglang-probe-")
        path = self._write_config(self._probe)
        prepare_this_process()
        # Loading bars and import-time warnings of every process would bury our own progress.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        os.environ[CONFIG_VARIABLE] = str(path.resolve())
        ranks = int(self._server.get("tp_size", 1)) * int(self._server.get("dp_size", 1))
        bind_cpus(os.environ, ranks)
        self._signals.keep()
        before = set(multiprocessing.active_children())
        try:
            import sglang

            self._engine = sglang.Engine(**self._server, **self._signals.arguments())
            self.run(self._listen())
        except BaseException as e:
            left = Children(p for p in multiprocessing.active_children() if p not in before)
            left.kill()
            fault = self._fault()
            self._end()
            if isinstance(e, ValueError | TypeError) or not isinstance(e, Exception):
                raise
            raise EngineDied(f"SGLang did not start: {fault or e}", fix="its log above says more") from e
        self._signals.restore(self._engine.loop)
        started = (p for p in multiprocessing.active_children() if p not in before)
        self._children = Children(started, self._server.get("watchdog_timeout"))

    async def _listen(self) -> None:
        """What SGLang does at the first request: now, because it installs signal handlers. It makes another event loop
        if it is not called from one."""
        self._engine.tokenizer_manager.auto_create_handle_loop()

    def _write_config(self, probe: EngineProbeConfig) -> Path:
        """Write what the scheduler process reads, and a copy into the run. JSON is YAML."""
        assert self._folder is not None
        text = json.dumps(probe.model_dump(mode="json"), indent=2) + "\n"
        if probe.replica == 0:  # one of several writes it
            (probe.run / PROBE_FILE).write_text(text, encoding="utf-8")
        (Path(self._folder.name) / fault_file(probe.replica)).unlink(missing_ok=True)  # of the recording before
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
            engine, self._engine = self._engine, None
            try:
                with self._children.alone(engine):
                    engine.shutdown()
            finally:
                self._end()

    def _end(self) -> None:
        os.environ.pop(CONFIG_VARIABLE, None)
        self._signals.give_back()
        if self._folder is not None:
            self._folder.cleanup()

    def in_force(self) -> dict[str, Any]:
        """What the scheduler of the present recording says of itself, for the manifest: `server_resolved`, the server
        arguments that decide rows, as they are in force, `weights`, what they were by the number of updates, and on
        an accelerator `certificate` and `graphs_checked`."""
        told: dict[str, Any] = json.loads((self._probe.run / ENGINE_FILE).read_text(encoding="utf-8"))
        return told

    @property
    def tokenizer_manager(self) -> Any:
        """SGLang's `TokenizerManager`, for clients that do more than ask and wait."""
        return self._engine.tokenizer_manager

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the engine's event loop."""
        return self._engine.loop.run_until_complete(main)

    async def generate(
        self,
        rid: str,
        prompt_ids: Sequence[int],
        sampling_params: dict[str, Any],
        begun: Callable[[], None] | None = None,
    ) -> Answer:
        """Serve one request and wait for its end.

        Args:
            begun: called when its first token came, if it can be told before its end.

        Raises:
            RequestRefused: SGLang refuses it, in whatever way. EngineDied: the engine ended.
        """
        # Where tokens come alone, and not with those before them, nobody puts them together here.
        stream = begun is not None and not self._server.get("incremental_streaming_output")
        self._in_flight[rid] = None
        try:
            out = await self._engine.async_generate(
                input_ids=list(prompt_ids), sampling_params=sampling_params, rid=rid, stream=stream
            )
            if begun is not None and stream:
                out = await last_of(out, begun)
        except Exception as e:
            # The check of a value, the template, the queue and the scheduler each have an exception of their own; what
            # they have in common is that they end this request alone, as long as the engine lives.
            self.look()
            raise RequestRefused(Refusal(rid, words_of(e))) from e
        finally:
            self._in_flight.pop(rid, None)
        return Answer(rid, list(out["output_ids"]), int(out["meta_info"]["cached_tokens"]))

    def ask(
        self, rid: str, prompt_ids: Sequence[int], sampling_params: dict[str, Any], **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Send one request as SGLang's own server does: its answers as they come, in SGLang's form and with its errors.

        Args:
            options: further fields of SGLang's `GenerateReqInput`.
        """
        from sglang.srt.managers.io_struct import GenerateReqInput

        fields = {"input_ids": list(prompt_ids), "sampling_params": dict(sampling_params), "rid": rid}
        answers: AsyncGenerator[Any, None] = self.tokenizer_manager.generate_request(
            GenerateReqInput(**fields, **options), None
        )
        return answers

    async def pause(self, mode: str) -> None:
        """Hold generation up; `mode` is one of SGLang's (`retract`, `in_place`)."""
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        await self.tokenizer_manager.pause_generation(PauseGenerationReqInput(mode=mode))

    async def unpause(self) -> None:
        """Go on with generation."""
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        await self.tokenizer_manager.continue_generation(ContinueGenerationReqInput())

    async def serve(
        self, requests: Sequence[Asked], concurrency: int, turns: Mapping[str, Turn] | None = None
    ) -> AsyncIterator[Answer | Refusal]:
        """Serve requests in order with at most `concurrency` in flight; answers come as they finish.

        Args:
            turns: by a request's own id; those that have one are sent by it.

        Raises:
            EngineDied: the engine ended. ProbeError: the recording stopped; nothing more is served.
        """
        requests_in_flight = InFlight(self)
        requests_in_flight.add(requests, turns)
        try:
            while requests_in_flight:
                for answer in await requests_in_flight.answered(concurrency):
                    yield answer
        finally:
            requests_in_flight.cancel()

    def look(self) -> None:
        """Whether the engine is alive and records.

        Raises:
            EngineDied: it ended; says why, as far as that is known. ProbeError: it stopped recording.
        """
        fault, ended = self._fault(), self._children.ended()
        if ended is None and (self._signals.child_failed or crashed(fault)):  # it writes its last part, and ends
            ended = self._children.wait_for_end()
            fault = self._fault()
        if ended is not None:
            fix = RESUME if crashed(fault) else ended.fix
            raise EngineDied(fault or ended.words, fix=fix, in_flight=list(self._in_flight))
        if fault is not None:
            raise ProbeError(fault)

    def _fault(self) -> str | None:
        """Why the probe stopped recording. It tells it beside its configuration if the disk of the run is full."""
        assert self._folder is not None
        replica = self._probe.replica
        return fault_of(self._probe.run, replica) or fault_of(Path(self._folder.name), replica)

    async def serve_groups(
        self, groups: Sequence[Sequence[Asked]], concurrency: int | None = None, *, order: Order = "as_given"
    ) -> AsyncIterator[Answer | Refusal]:
        """Serve groups of requests one after the other, as `serve`.

        Args:
            concurrency: at most so many of a group in flight; None: all of them.
            order: of the requests of each group.
        """
        page_size = int(self._server.get("page_size") or 1)
        for group in groups:
            turns = turns_by_families(group, page_size=page_size) if order == "families" else None
            async for answer in self.serve(group, concurrency or len(group), turns):
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
            raise ProbeError(self._fault() or "the engine refused to close the recording")

    def _tell(self, command: str, value: int, timeout: float) -> list[bool]:
        """Send a command to every data-parallel rank (`sglang_probe.engine.hooks.control`)."""
        from sglang.srt.managers.io_struct import SetInternalStateReq

        async def tell() -> list[bool]:
            request = SetInternalStateReq(server_args={command: value})
            asked = asyncio.ensure_future(self._engine.tokenizer_manager.set_internal_state(request))
            deadline = time.monotonic() + timeout
            try:
                while not asked.done():  # a process that ended answers nothing
                    if self._children.ended() is not None or self._signals.child_failed:
                        self.look()
                    if (left := deadline - time.monotonic()) <= 0:
                        raise TimeoutError
                    await asyncio.wait([asked], timeout=min(left, LOOK_SECONDS))
                return list(asked.result())
            finally:
                asked.cancel()

        replies: list[bool] = self.run(tell())
        return replies
