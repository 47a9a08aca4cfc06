"""`/probe/*` on SGLang's own HTTP server, in the process that serves it.

The routes ask the scheduler process over SGLang's internal-state channel. They are added before SGLang installs its API
key check (`utils/auth.py`), which covers every route of the application; `POST /probe/flush` takes the admin key where
there is one, like SGLang's own `/set_internal_state`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sglang_probe.config import load_config
from sglang_probe.engine.hooks.config import CONFIG_VARIABLE, EngineProbeConfig
from sglang_probe.engine.hooks.control import CLOSE
from sglang_probe.engine.hooks.fetching import found_in
from sglang_probe.engine.hooks.instruments.live import STATE_KEY, answers_folder
from sglang_probe.engine.live import causes
from sglang_probe.engine.live.answer_files import rank_folders
from sglang_probe.engine.live.merge import merge_states
from sglang_probe.rows_ask import HANDLE, file_name
from sglang_probe.steering.library import Library, listed

logger = logging.getLogger("sglang_probe")

TARGET = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"

_FLUSH_SECONDS = 30.0
_WHY_SECONDS, _WHY_KEPT = 120.0, 5.0
"""How long the causes of a segment may take, and how long an answer is given again."""
_TOO_LONG = "finding the causes took too long; close the segment and ask `sglang-probe why`"
_WHY_WAITING = 4
"""Questions that may wait for their turn."""
_ROWS_SECONDS = 30.0
_ROWS_WAITING = 128
"""Requests that may wait for rows."""
_BUSY = "too many ask this already; try again in a moment"
_CHANGED = "the library was changed while the server started: start it again"
_RECORDING = ("recording", "reason", "tries_again_in")
"""What every endpoint says first: counts stand still while nothing is recorded."""
_COVERAGE = (
    *_RECORDING,
    "positions",
    "requests",
    "requests_in_flight",
    "requests_unaccounted",
    "forwards",
    "recent",
)


def add_routes(server_args: Any, tokenizer_manager: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE `_setup_and_run_http_server`: add the routes. A failure costs the routes, not the server."""
    try:
        if server_args.tokenizer_worker_num > 1:
            logger.warning(
                "sglang-probe: no /probe endpoints with --tokenizer-worker-num > 1, because SGLang loads no plugins in "
                "these processes; the recording itself is not affected"
            )
            return
        from sglang.srt.entrypoints.http_server import app
        from sglang.srt.utils.auth import AuthLevel, auth_level

        endpoints = Endpoints(
            tokenizer_manager.get_internal_state,
            _closer(tokenizer_manager),
            _emptier(tokenizer_manager),
            _libraries(),
            _answers(),
            ids=not server_args.admin_api_key,
        )
        app.add_api_route("/probe/status", endpoints.status, methods=["GET"])
        app.add_api_route("/probe/coverage", endpoints.coverage, methods=["GET"])
        app.add_api_route("/probe/alerts", endpoints.alerts, methods=["GET"])
        for name, named in (("coverage", endpoints.coverage_by_id), ("alerts", endpoints.alerts_by_id)):
            by_id = auth_level(AuthLevel.ADMIN_OPTIONAL)(_function(named))
            app.add_api_route(f"/probe/{name}/ids", by_id, methods=["GET"])
        app.add_api_route("/probe/vectors", endpoints.vectors, methods=["GET"])
        app.add_api_route("/probe/why", auth_level(AuthLevel.ADMIN_OPTIONAL)(_function(endpoints.why)), methods=["GET"])
        app.add_api_route("/probe/rows/{handle}", endpoints.rows, methods=["GET"])
        flush = auth_level(AuthLevel.ADMIN_OPTIONAL)(_function(endpoints.flush))
        app.add_api_route("/probe/flush", flush, methods=["POST"])
    except Exception:
        logger.exception("sglang-probe could not add its endpoints")


class Endpoints:
    """The routes.

    Args:
        states: asks every scheduler process for its internal state.
        close: has every scheduler process close its segment; true for each that agreed.
        empty: flushes the radix cache once nothing is in flight, if that is so within so many seconds; whether it did.
        libraries: of vectors, by what they are for.
        answers: folder where rows wait for those who asked for them; None: nobody may ask.
        ids: whether `coverage` and `alerts` name requests: where there is no admin key, whoever may ask is trusted.
    """

    def __init__(
        self,
        states: Callable[[], Awaitable[list[dict[str, Any]]]],
        close: Callable[[], Awaitable[list[bool]]],
        empty: Callable[[float], Awaitable[bool]],
        libraries: Mapping[str, Library] = MappingProxyType({}),
        answers: Path | None = None,
        *,
        ids: bool = True,
    ) -> None:
        self._ids = ids
        self._states = states
        self._close = close
        self._empty = empty
        self._looking = asyncio.Lock()
        self._why_waiting = self._rows_waiting = 0
        self._why: dict[tuple[Any, ...], tuple[float, dict[str, Any]]] = {}
        self._libraries, self._answers = libraries, answers

    async def status(self) -> dict[str, Any]:
        """`GET /probe/status`: recording or why not, where to, how much, and what waits."""
        state = await self._state()
        versions = {name: importlib.metadata.version(name) for name in ("sglang-probe", "sglang", "torch")}
        told = {k: v for k, v in state.items() if k != "recent"}
        if "monitor" in told:  # `alerts` has the rest
            told["monitor"] = {k: v for k, v in told["monitor"].items() if k not in ("alerts", "events", "highest")}
        return {**told, "versions": versions}

    async def coverage(self, n: int = 20) -> dict[str, Any]:
        """`GET /probe/coverage?n=20`: totals by class, and the last `n` requests; without their ids where there is an
        admin key."""
        told = await self.coverage_by_id(n)
        return told if self._ids else _unnamed(told)

    async def coverage_by_id(self, n: int = 20) -> dict[str, Any]:
        """`GET /probe/coverage/ids?n=20`: the same with the ids, for the admin key."""
        state = await self._state()
        out = {k: state[k] for k in _COVERAGE if k in state}
        out["recent"] = out.get("recent", [])[: max(n, 0)]
        p = state.get("positions", {})
        prompt = p.get("computed", 0) + p.get("reused", 0)
        out["prompt_reused_fraction"] = round(p["reused"] / prompt, 6) if prompt else None
        return out

    async def alerts(self, n: int = 20) -> Any:
        """`GET /probe/alerts?n=20`: of the monitor, the last `n` requests that were unusual and every event, with its
        evidence; how far each detector of drift is from its alarm. 404 where the server has no monitor. Without the
        requests' ids where there is an admin key.

        Of several data-parallel ranks each has a monitor of its own (`ranks`).
        """
        told = await self.alerts_by_id(n)
        return told if self._ids or not isinstance(told, dict) else _unnamed(told)

    async def alerts_by_id(self, n: int = 20) -> Any:
        """`GET /probe/alerts/ids?n=20`: the same with the ids, for the admin key."""
        from fastapi.responses import JSONResponse

        states = await self._each()
        told = []
        for state in states:
            if (monitor := state.get("monitor")) is None:
                reason = state["reason"] or "this server has no `monitor`"
                return JSONResponse({"reason": reason}, status_code=404 if state["recording"] else 503)
            told.append({**{k: state.get(k) for k in _RECORDING}, **monitor})
            told[-1]["alerts"] = told[-1]["alerts"][: max(n, 0)]
        return told[0] if len(told) == 1 else {"ranks": told}

    async def why(self, by: str = "session", rid: str | None = None) -> Any:
        """`GET /probe/why?by=session`, `GET /probe/why?rid=...`: why prompt tokens were computed since the current
        segment began, as far as it is on disk; counts and positions, and nothing of a prompt.

        A process of low priority reads the segment and those before it, one at a time; an answer is given again for
        some seconds. 404: prompts are not recorded (`privacy: none`), or there is no such request. 429: several
        questions wait already. 504: it took too long.
        """
        from fastapi.responses import JSONResponse

        told = []
        for state in await self._each():
            if (path := (state.get("segment") or {}).get("path")) is None:
                return JSONResponse({k: state.get(k) for k in _RECORDING}, status_code=503)
            if state.get("privacy") == "none":
                reason = "prompts are not recorded: `live: {privacy: hashes}` is enough"
                return JSONResponse({"reason": reason}, status_code=404)
            found = await self._asked_why({"segment": path, "by": by, "rid": rid})
            told.append({**{k: state.get(k) for k in _RECORDING}, **found})
        known = [t for t in told if "causes" in t]
        if not known:
            status = {_TOO_LONG: 504, _BUSY: 429}.get(str(told[0].get("reason")), 404)
            return JSONResponse(told[0], status_code=status)
        return known[0] if len(told) == 1 else {"ranks": known if rid is not None else told}

    async def _asked_why(self, asked: dict[str, Any]) -> dict[str, Any]:
        key = tuple(asked.values())
        if (told := self._told_just_now(key)) is not None:
            return told
        if self._why_waiting >= _WHY_WAITING:
            return {"reason": _BUSY}
        self._why_waiting += 1
        try:
            async with self._looking:
                if (told := self._told_just_now(key)) is None:
                    told = await _causes_of(asked)
                    now = time.monotonic()
                    self._why = {k: v for k, v in self._why.items() if now - v[0] < _WHY_KEPT} | {key: (now, told)}
                return told
        finally:
            self._why_waiting -= 1

    def _told_just_now(self, key: tuple[Any, ...]) -> dict[str, Any] | None:
        at, told = self._why.get(key, (-_WHY_KEPT, None))
        return told if time.monotonic() - at < _WHY_KEPT else None

    async def vectors(self) -> Any:
        """`GET /probe/vectors`: what a request may name (`steer`) and what is scored (`scores`): the hash of each
        library, and the card of every vector with its hash. Never a tensor. 503 if a scheduler process has another
        library than this one, because the folder was changed while the server started."""
        from fastapi.responses import JSONResponse

        for state in await self._each():
            loaded = state.get("libraries", {})
            if other := [what for what, library in self._libraries.items() if loaded.get(what) != library.hash]:
                reason = state["reason"] if not state["recording"] and not loaded else _CHANGED
                return JSONResponse({"reason": f"`{other[0]}`: {reason}"}, status_code=503)
        return {what: {"library": lib.hash, "vectors": listed(lib)} for what, lib in self._libraries.items()}

    async def rows(self, handle: str, timeout: float = 10.0) -> Any:
        """`GET /probe/rows/<handle>?timeout=10`: rows that a request asked for under this handle (`Ask.rows`), as
        safetensors; waits so many seconds for them, 30 at most. 404: there are none, or not yet. 410: they were there,
        and have expired. 503: there will be none, because the recording stopped or there was no room. 429: too many
        wait already. The server's API key and the handle are both needed.
        """
        from fastapi.responses import JSONResponse

        if self._answers is None:
            return JSONResponse(
                {"reason": "this server hands out no rows: its probe YAML needs `asks: [rows]`"}, status_code=404
            )
        if not re.fullmatch(HANDLE, handle):
            return JSONResponse(
                {"reason": f"a handle is 22 to 128 letters, digits, `_` or `-` ({HANDLE})"}, status_code=400
            )
        places = [folder / file_name(handle) for folder in rank_folders(self._answers)]
        if (found := found_in(places)) is not None:
            return found
        if self._rows_waiting >= _ROWS_WAITING and timeout > 0:
            return JSONResponse({"reason": _BUSY}, status_code=429)
        deadline = time.monotonic() + min(max(0.0, timeout), _ROWS_SECONDS)
        pause = 0.005
        self._rows_waiting += 1
        try:
            while time.monotonic() < deadline:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.25)
                if (found := found_in(places)) is not None:
                    return found
        finally:
            self._rows_waiting -= 1
        reason = "no rows under this handle: no request that ended asked for any, or they are not there yet"
        return JSONResponse({"reason": reason}, status_code=404)

    async def flush(self, cache: bool = False, timeout: float = 0.0) -> Any:
        """`POST /probe/flush?cache=true&timeout=5`: close the current segment and wait until it is on disk. 503 while
        nothing is recorded, 504 if the disk does not finish in time.

        A segment is closed on demand once in `segments: {min_seconds}` at most: whoever asks sooner waits, and all who
        wait get the same segment. One in which nothing was recorded is not closed, and `closed` is false.

        With `cache` the radix cache is flushed first, so that nothing in the next segment is reused from this one.
        SGLang does that only while nothing is in flight; `timeout` seconds are waited for such a moment, then the
        answer is 409 and the segment goes on.
        """
        from fastapi.responses import JSONResponse

        if cache and not await self._empty(min(max(0.0, timeout), _FLUSH_SECONDS * 10)):
            reason = "requests are in flight, so SGLang does not flush its cache; the segment goes on"
            return JSONResponse({"flushed": False, "reason": reason}, status_code=409)
        if not all(await self._close()):
            return _not_flushed(await self._state(), 503)
        states = await self._each()
        asked = [state["flush"]["asked"] for state in states]
        deadline = time.monotonic() + _FLUSH_SECONDS + max(s["flush"].get("at_most_every", 0.0) for s in states)
        pause = 0.02
        while any(state["flush"]["done"] < n for state, n in zip(states, asked, strict=True)):
            state = merge_states(states)
            if time.monotonic() > deadline or not state["recording"]:
                return _not_flushed(state, 504 if state["recording"] else 503)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.25)
            states = await self._each()
        closed = [state["flush"]["segment"] for state in states]
        following = [state["segment"]["path"] for state in states]
        empty = all(state["flush"].get("nothing_new") for state in states)
        said = {"reason": "nothing was recorded since the last segment was closed"} if empty else {}
        answer = {"flushed": True, "closed": not empty, **said}
        if len(states) == 1:
            return {**answer, "segment": closed[0], "next": following[0]}
        return {**answer, "segments": closed, "next": following}

    async def _state(self) -> dict[str, Any]:
        return merge_states(await self._each())

    async def _each(self) -> list[dict[str, Any]]:
        """The state of every data-parallel rank, in their order; they answer in any."""
        silent = {"recording": False, "reason": "the scheduler process has no probe"}
        states = [state.get(STATE_KEY) or silent for state in await self._states()] or [silent]
        return sorted(states, key=lambda state: state.get("dp_rank", 0))


async def _causes_of(asked: dict[str, Any]) -> dict[str, Any]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *causes.COMMAND, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, env=causes.environment()
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(json.dumps(asked).encode()), _WHY_SECONDS)
        return dict(json.loads(out))
    except TimeoutError:
        return {"reason": _TOO_LONG}
    except ValueError:
        return {"reason": "what was written could not be read", "fix": "see `sglang-probe verify`"}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _libraries() -> dict[str, Library]:
    """None where they cannot be read here: the other endpoints are worth having, and the schedulers have theirs."""
    try:
        return libraries_of(load_config(Path(os.environ[CONFIG_VARIABLE]), EngineProbeConfig))
    except Exception:
        logger.exception("sglang-probe cannot list vectors: this process could not read the library")
        return {}


def _answers() -> Path | None:
    """None where nobody may ask for rows, or the configuration cannot be read here."""
    try:
        config = load_config(Path(os.environ[CONFIG_VARIABLE]), EngineProbeConfig)
    except Exception:
        logger.exception("sglang-probe cannot hand out rows: this process could not read the configuration")
        return None
    return answers_folder(config.run) if "rows" in config.asks else None


def libraries_of(config: EngineProbeConfig) -> dict[str, Library]:
    """The libraries of a configuration, by what they are for. The process that serves HTTP has no session: it reads
    what the scheduler processes read.

    Raises:
        ConfigError: one cannot be read.
    """
    given = {"steer": config.steer, "scores": config.scores}
    return {what: Library.open(c.library).without_saes() for what, c in given.items() if c is not None}


def _unnamed(told: Any) -> Any:
    """Without ids of requests, at any depth."""
    if isinstance(told, dict):
        return {k: _unnamed(v) for k, v in told.items() if k != "rid"}
    return [_unnamed(v) for v in told] if isinstance(told, list) else told


def _not_flushed(state: dict[str, Any], status: int) -> Any:
    from fastapi.responses import JSONResponse

    told = {name: state.get(name) for name in _RECORDING}
    return JSONResponse({"flushed": False, **told, "reason": told["reason"] or "timeout"}, status_code=status)


def _closer(tokenizer_manager: Any) -> Callable[[], Awaitable[list[bool]]]:
    from sglang.srt.managers.io_struct import SetInternalStateReq

    async def close() -> list[bool]:
        return list(await tokenizer_manager.set_internal_state(SetInternalStateReq(server_args={CLOSE: 1})))

    return close


def _emptier(tokenizer_manager: Any) -> Callable[[float], Awaitable[bool]]:
    from sglang.srt.managers.io_struct import FlushCacheReqInput

    async def empty(timeout: float) -> bool:
        # SGLang's own `flush_cache` looks at the first data-parallel rank's answer only.
        tokenizer_manager.auto_create_handle_loop()
        replies = await tokenizer_manager.flush_cache_communicator(FlushCacheReqInput(timeout_s=timeout))
        return all(reply.success for reply in replies)

    return empty


def _function(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """SGLang marks the auth level on the endpoint itself, and a bound method takes no attributes."""

    @functools.wraps(method)  # and with it the signature, which names the query parameters
    async def endpoint(*args: Any, **kwargs: Any) -> Any:
        return await method(*args, **kwargs)

    return endpoint
