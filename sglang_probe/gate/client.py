"""A client of SGLang's public HTTP API that reads log-probabilities and counts of cached tokens. Standard library only.

`logprob_start_len` is the border from which log-probabilities of the prompt are asked for. SGLang reuses nothing past
it (`managers/schedule_batch.py`), so a request whose border is the end of its prefix may reuse the whole prefix, and
every token after it has a log-probability that was computed over reused entries, whatever the model then generates.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from sglang_probe.client import FetchedRows, RowsError, fetch_rows
from sglang_probe.errors import ConfigError, ProbeError

KEY_VARIABLE = "SGLANG_PROBE_GATE_KEY"
TOP = 5
"""Log-probabilities asked for at each generated position: what the other answer's token had, where two part."""
Ids = tuple[int, ...]
Array = np.ndarray[Any, Any]


class RefusedError(ProbeError):
    """The server answers, and refuses this request."""

    status = 0


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    rid: str
    cached: int | None
    """Prompt tokens that the server says it reused; None where it does not say."""
    prompt: Array
    """Log-probabilities of the prompt's last tokens, `[asked - 1]`, nats: of the tokens after the border."""
    output: Ids
    """Generated tokens."""
    chosen: Array
    """Their log-probabilities, `[generated]`, nats."""
    top: tuple[Mapping[int, float], ...] = ()
    """The most probable tokens at each of them."""
    origin: tuple[Mapping[str, Any], ...] = ()
    """Spans of the probe's ledger, where the server has the plugin: which request's entries were reused."""

    @property
    def finite(self) -> bool:
        """Whether every log-probability is a number."""
        return bool(np.isfinite(self.prompt).all() and np.isfinite(self.chosen).all())


@dataclass
class Facts:
    """What the server says of itself; what it does not say is None."""

    version: str | None = None
    model: str | None = None
    dtype: str | None = None
    page_size: int | None = None
    chunk: int | None = None
    context: int | None = None
    radix: bool | None = None
    probe: bool = False
    """Whether it records with this package's plugin, which then names the origin of reused entries."""
    rows: bool = False
    """Whether it hands out rows to who asks (`asks: [rows]`)."""
    further: dict[str, Any] = field(default_factory=dict)


class Client:
    """One server.

    Args:
        url: `http://host:port`, without a path.
        timeout: seconds that one request may take.
        key_variable: environment variable with the server's API key; without one none is sent.

    Raises:
        ConfigError: the address is none, or nobody answers there.
    """

    def __init__(self, url: str, *, timeout: float = 300.0, key_variable: str = KEY_VARIABLE) -> None:
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and url.isascii()
        except ValueError:
            valid = False
        if not valid or parts.username or parts.query:
            raise ConfigError(f"`{url}` is no address of a server", fix="give one as http://127.0.0.1:30000")
        path = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{path.removesuffix('/v1')}"
        self._timeout = timeout
        self._variable = key_variable
        self._key = os.environ.get(key_variable, "").strip()
        self._open = urllib.request.build_opener(_NoRedirect).open
        self.asked = 0

    def facts(self) -> Facts:
        """What `/server_info`, `/model_info` and `/probe/status` say.

        Raises:
            ConfigError: nobody answers.
        """
        info = self._first("/server_info", "/get_server_info")
        model = self._first("/model_info", "/get_model_info")
        status = self._first("/probe/status")
        inner = info.get("server_args")
        args = inner if isinstance(inner, dict) else info
        state = (info.get("internal_states") or [{}])[0] if isinstance(info.get("internal_states"), list) else {}

        def told(name: str, kind: type) -> Any:
            for where in (args, info, state, model):
                value = where.get(name)
                if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
                    return value
            return None

        off = told("disable_radix_cache", bool)
        name = told("served_model_name", str) or told("model_path", str)
        return Facts(
            version=told("version", str),
            model=os.path.basename(name.rstrip("/").removesuffix("/checkpoint")) if name else None,
            dtype=told("dtype", str),
            page_size=told("page_size", int),
            chunk=told("chunked_prefill_size", int),
            context=told("context_length", int) or told("max_req_input_len", int),
            radix=None if off is None else not off,
            probe=status.get("recording") is True,
            rows=isinstance(status.get("rows_asked"), dict),
            further={k: told(k, object) for k in ("attention_backend", "tp_size", "dp_size", "kv_cache_dtype")},
        )

    def ids(self, text: str) -> Ids:
        """Token ids of a text as the server makes them: those that it gives log-probabilities of.

        Raises:
            RefusedError: the server takes no text, or gives no log-probabilities.
        """
        body = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        told = self.call("/generate", {**body, "return_logprob": True, "logprob_start_len": 0})
        found = told["meta_info"].get("input_token_logprobs")
        if not found:
            raise RefusedError("the server gives no log-probabilities of the prompt's tokens", fix="give token ids")
        return tuple(int(entry[1]) for entry in found)

    def ask(
        self,
        ids: Sequence[int],
        *,
        new: int,
        start: int = -1,
        salt: Mapping[str, str] | None = None,
        origin: bool = False,
        rid: str | None = None,
        asks: Mapping[str, Any] | None = None,
    ) -> Answer:
        """One greedy request.

        Args:
            start: position of the prompt from which log-probabilities are asked for; -1: of generated tokens only.
            salt: fields of the request that separate its cache entries from others'.
            origin: also ask the probe which request's entries were reused.
            rid: name of the request; default: the server gives one.
            asks: what else is asked of the probe (`custom_params.probe`).

        Raises:
            RefusedError: the server refuses it, or answers without log-probabilities, or with fewer tokens than asked.
        """
        params: dict[str, Any] = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        if probe := {**({"provenance": True} if origin else {}), **(asks or {})}:
            params["custom_params"] = {"probe": probe}
        body = {"input_ids": list(ids), "sampling_params": params, "return_logprob": True, **(salt or {})}
        body |= {"logprob_start_len": start, "top_logprobs_num": TOP}
        told = self.call("/generate", body if rid is None else {**body, "rid": rid})
        answer = read_answer(told, ids, 0 if start < 0 else len(ids) - start)
        if len(answer.output) != new:  # the end of a text does not end it: `ignore_eos`
            reason = (told["meta_info"].get("finish_reason") or {}).get("type")
            raise RefusedError(f"{len(answer.output)} of {new} tokens came back (`finish_reason: {reason}`)")
        return answer

    def rows(self, asked: Mapping[str, Any], timeout: float = 20.0) -> FetchedRows | None:
        """Rows of a request that asked for them (`asks`); None: the server has none, or not in time."""
        try:
            return fetch_rows(self.url, asked, api_key=self._key or None, timeout=timeout)
        except (RowsError, OSError):
            return None

    def give_up(self, ids: Sequence[int], *, salt: Mapping[str, str] | None = None) -> None:
        """A request whose client goes away once it has the first piece of a long answer.

        Raises:
            ConfigError: nobody answers.
            RefusedError: the server refuses it.
        """
        params = {"temperature": 0, "max_new_tokens": 512, "ignore_eos": True}
        body = {"input_ids": list(ids), "sampling_params": params, "stream": True, **(salt or {})}
        with self._send("/generate", body) as answer:
            answer.readline()

    def flush(self) -> bool:
        """Empty the cache; whether the server did."""
        try:
            self.call("/flush_cache?timeout=10", {}, plain=True)
        except RefusedError:
            return False
        return True

    def call(self, path: str, body: Mapping[str, Any] | None, *, plain: bool = False) -> Any:
        """One request, and its answer as JSON.

        Raises:
            ConfigError: nobody answers, or not in JSON.
            RefusedError: the server refuses.
        """
        with self._send(path, body) as answer:
            raw = answer.read()
        if plain:
            return None
        try:
            return json.loads(raw)
        except ValueError as e:
            raise ConfigError(f"{self.url}{path} does not answer in JSON", fix="is it an SGLang server?") from e

    @contextlib.contextmanager
    def _send(self, path: str, body: Mapping[str, Any] | None) -> Iterator[Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        self.asked += 1
        try:
            with self._open(urllib.request.Request(self.url + path, data, headers), timeout=self._timeout) as answer:
                yield answer
        except urllib.error.HTTPError as e:
            said = " ".join(e.read(2_000).decode("utf-8", "replace").split())[:300]
            fix = f"set the environment variable {self._variable} to its API key" if e.code in (401, 403) else None
            refused = RefusedError(f"{self.url}{path} answers {e.code}: {said}", fix=fix)
            refused.status = e.code
            raise refused from e
        except (OSError, http.client.HTTPException) as e:
            raise ConfigError(
                f"no answer from {self.url}: {getattr(e, 'reason', e)}",
                fix="is the server up, and is this its address?",
            ) from e

    def _first(self, *paths: str) -> dict[str, Any]:
        for path in paths:
            try:
                told = self.call(path, None)
            except RefusedError as e:
                if e.status in (401, 403):
                    raise
                continue
            if isinstance(told, dict):
                return told
        return {}


def read_answer(told: Any, ids: Sequence[int], asked: int) -> Answer:
    """An answer of `/generate`. A log-probability that is null is NaN: so SGLang writes NaN in JSON.

    Args:
        ids: the prompt.
        asked: so many of its last tokens were asked for. The first of these is left out: its log-probability is null,
            since what it was conditioned on was not asked for, and a null that stands for NaN looks the same.

    Raises:
        RefusedError: log-probabilities are missing, or are those of other tokens.
    """
    try:
        meta = told["meta_info"]
        prompt = (meta.get("input_token_logprobs") or [])[-(asked - 1) :] if asked > 1 else []
        out = meta["output_token_logprobs"]
        top = meta.get("output_top_logprobs") or []
        if [int(e[1]) for e in prompt] != list(ids)[len(ids) - len(prompt) :]:
            raise RefusedError("the server gives log-probabilities of other tokens than those of the prompt")
        if not out:
            raise RefusedError("no log-probabilities of generated tokens came back")
        if len(prompt) < asked - 1:
            raise RefusedError(f"{len(prompt)} of {max(0, asked - 1)} log-probabilities of the prompt came back")
        reason = (meta.get("finish_reason") or {}).get("type")
        if reason == "abort":
            raise RefusedError(f"the server gave the request up: {meta['finish_reason'].get('message', '')}")
        cached = meta.get("cached_tokens")
        return Answer(
            rid=str(meta.get("id", "")),
            cached=int(cached) if isinstance(cached, int) else None,
            prompt=np.array([_number(e[0]) for e in prompt]),
            output=tuple(int(e[1]) for e in out),
            chosen=np.array([_number(e[0]) for e in out]),
            top=tuple({int(e[1]): _number(e[0]) for e in (entries or [])} for entries in top),
            origin=tuple(s for s in (meta.get("probe") or []) if isinstance(s, dict)),
        )
    except (KeyError, TypeError, IndexError, ValueError) as e:
        raise RefusedError(f"the server's answer has no log-probabilities ({type(e).__name__}: {e})") from e


def _number(x: Any) -> float:
    return float("nan") if x is None else float(x)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for one host: it is not carried to wherever that points."""

    def redirect_request(self, *_: Any) -> None:
        return None
