"""A chat endpoint of any maker (`/v1/chat/completions` as OpenAI documents it), whose answers are kept.

Every question with its answer is a line of a file. What was answered is not asked again: a study that was interrupted,
or that is run again with another setting, goes on from there. The key of an answer is a hash of everything that the
answer depends on: model, hash of its weights (the address of the endpoint where that is not known), and the body of the
request. An empty answer is kept in the file too, and is asked for again by the next run.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sglang_probe.errors import ConfigError
from sglang_probe.run.weights import weight_hash_of_folder

KEY_VARIABLE = "SGLANG_PROBE_LABEL_KEY"
ANSWERS = "answers.jsonl"
TRIES, MOST_SECONDS = 5, 60.0
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses after which the same request may succeed."""
_MOST_BYTES = 4_000_000
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Served:
    """Who answers."""

    model: str
    """The name that requests give."""
    host: str
    """Host and port of the endpoint, without key or path."""
    weights_sha256: str | None
    """`sglang_probe.run.weights.weight_hash` of its files, where the server names a folder of this machine."""
    server: dict[str, Any]
    """What the server says of the model, paths left out."""


class Endpoint:
    """Asks, and keeps the answers.

    Args:
        url: as OpenAI's `base_url`: it ends in `/v1` for most servers.
        model: the name that requests give; default: the one that the endpoint lists, if it lists one.
        answers: the file that answers are kept in.
        key_variable: environment variable with the key; without one none is sent.
        body: further keys of every request; null takes one out.
        sleep: waits so many seconds before a further try.

    Raises:
        ConfigError: it does not answer, or not as such an endpoint does, or has no such model.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        answers: Path,
        *,
        key_variable: str = KEY_VARIABLE,
        body: Mapping[str, Any] | None = None,
        concurrency: int = 4,
        timeout: float = 300.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and url.isascii()
        except ValueError:  # brackets without an address between them, or no number after the colon
            valid = False
        if not valid:
            raise ConfigError(f"`{url}` is no address of an endpoint", fix="give one as http://127.0.0.1:30000/v1")
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                "the address of the endpoint holds a password or a query, and would be kept with the labels",
                fix=f"give the plain address, and the key in the environment variable {key_variable}",
            )
        self._url, self._variable, self._sleep, self._timeout = url.rstrip("/"), key_variable, sleep, timeout
        self._key = _key(key_variable)
        self._body = dict(body or {})
        self._concurrency = concurrency
        self._open = urllib.request.build_opener(_NoRedirect).open
        self._lock = threading.Lock()
        self._file = answers
        self._known = _read(answers)
        self.asked = 0
        """Requests that were sent in this run."""
        self.served = self._look(model)

    def ask(
        self,
        questions: Sequence[Messages],
        *,
        most_tokens: int,
        forms: Sequence[str] | None = None,
        tell: Callable[[int, int], None] = lambda done, of: None,
    ) -> list[str]:
        """Answers to all of the questions, in their order.

        Args:
            forms: a regular expression for each, to which the server holds its answer (`regex`, as SGLang takes it).

        Raises:
            ConfigError: the endpoint refuses, or does not answer. What was answered before is kept.
        """
        bodies = [self._request(q, most_tokens) for q in questions]
        if forms is not None:
            bodies = [{**b, "regex": form} for b, form in zip(bodies, forms, strict=True)]
        keys = [self._key_of(b) for b in bodies]
        missing = list({k: b for k, b in zip(keys, bodies, strict=True) if k not in self._known}.items())
        done = len(set(keys)) - len(missing)
        tell(done, len(set(keys)))
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            waiting = {pool.submit(self._answer, key, body) for key, body in missing}
            while waiting:
                finished, waiting = wait(waiting, timeout=1.0, return_when=FIRST_EXCEPTION)
                for one in finished:
                    one.result()
                done += len(finished)
                tell(done, len(set(keys)))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return [self._known[k] for k in keys]

    def _request(self, messages: Messages, most_tokens: int) -> dict[str, Any]:
        body = {"model": self.served.model, "messages": messages, "temperature": 0, "max_tokens": most_tokens}
        return {k: v for k, v in {**body, **self._body}.items() if v is not None}

    def _key_of(self, body: Mapping[str, Any]) -> str:
        # The same name may be another model at another address.
        told = json.dumps([self.served.weights_sha256 or self._url, body], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(told.encode()).hexdigest()

    def _answer(self, key: str, body: Mapping[str, Any]) -> None:
        told = self._call("/chat/completions", body)
        try:
            choice = told["choices"][0]
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError) as e:
            raise ConfigError(
                f"{self._url} does not answer as a chat endpoint: there is no `choices[0].message.content`",
                fix="the address is that of an OpenAI-compatible API, and ends in /v1 for most servers",
            ) from e
        line = {
            "key": key,
            "host": self.served.host,
            "weights_sha256": self.served.weights_sha256,
            "served_model": told.get("model"),
            "fingerprint": told.get("system_fingerprint"),
            "finish_reason": choice.get("finish_reason"),
            **body,
            "answer": text,
        }
        with self._lock:
            self.asked += 1
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._known[key] = text

    def _look(self, model: str | None) -> Served:
        try:
            listed = self._call("/models", None)
        except _Refused as e:
            if e.status not in (404, 405, 501) or model is None:
                raise
            # Some gateways list nothing. Whether they have the model is seen when it is asked.
            return Served(model, urlsplit(self._url).netloc, None, {"id": _name(model)})
        entries = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "id" in e for e in entries):
            raise ConfigError(
                f"{self._url}/models lists no models",
                fix="the address is that of an OpenAI-compatible API, and ends in /v1 for most servers",
            )
        names = [str(e["id"]) for e in entries]
        if model is None:
            if len(names) != 1:
                shown = ", ".join(f"`{n}`" for n in names[:10]) or "none"
                raise ConfigError(f"{self._url} has {len(names)} models: {shown}", fix="name one with --label-model")
            model = names[0]
        elif model not in names:
            shown = ", ".join(f"`{n}`" for n in names[:10]) or "none"
            raise ConfigError(f"{self._url} has no model `{model}`", fix=f"it has {shown}")
        entry = entries[names.index(model)]
        root = str(entry.get("root") or model)
        # SGLang and vLLM name the folder that they serve; on another machine its files are not at hand.
        digest = weight_hash_of_folder(root) if Path(root).is_absolute() and Path(root).is_dir() else None
        kept = {k: entry[k] for k in ("id", "owned_by", "max_model_len") if k in entry}
        return Served(model, urlsplit(self._url).netloc, digest, {**kept, "id": _name(model)})

    def _call(self, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        for left in range(TRIES - 1, -1, -1):
            try:
                with self._open(request, timeout=self._timeout) as answer:
                    raw = answer.read(_MOST_BYTES)
                return self._json(path, raw)
            except urllib.error.HTTPError as e:
                if e.code not in _AGAIN or not left:
                    raise self._refused(e) from e
                pause = _pause(e.headers.get("Retry-After"), left)
            except (OSError, http.client.HTTPException) as e:
                # Nobody listens: no use in waiting. A connection that broke is another matter.
                if isinstance(getattr(e, "reason", e), ConnectionRefusedError) or not left:
                    raise ConfigError(
                        f"no answer from {self._url}: {getattr(e, 'reason', e)}",
                        fix="is the server up, and is this its address? It ends in /v1 for most servers. What was "
                        "answered so far is kept: the same command goes on from there",
                    ) from e
                pause = _pause(None, left)
            self._sleep(pause)
        raise AssertionError

    def _json(self, path: str, raw: bytes) -> Any:
        try:
            return json.loads(raw)
        except ValueError as e:
            raise ConfigError(
                f"{self._url}{path} does not answer in JSON", fix="is it an OpenAI-compatible API?"
            ) from e

    def _refused(self, e: urllib.error.HTTPError) -> _Refused:
        said = _message(e)
        if e.code in (401, 403):
            has = "was refused" if self._key else "is missing"
            fix = f"the key {has}: set the environment variable {self._variable}, or name another with --label-key"
        elif e.code == 404:
            fix = "the address ends in /v1 for most servers; `--label-model` names a model that it has"
        elif 300 <= e.code < 400:
            fix = f"it points to {e.headers.get('Location')}, which is not followed with a key: give that address"
        elif e.code in (400, 413, 422):
            fix = "if the prompt is too long, give fewer --label-examples; a key of the body that it does not know is "
            fix += 'taken out or replaced by --label-body, e.g. {"max_tokens": null, "max_completion_tokens": 400}'
        else:
            fix = "what was answered so far is kept: the same command goes on from there"
        refused = _Refused(f"{self._url} answers {e.code}: {said}", fix=fix)
        refused.status = e.code
        return refused


def _key(variable: str) -> str | None:
    """The key, without the end of the line that a file leaves on it.

    Raises:
        ConfigError: it cannot be sent.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"the key in the environment variable {variable} holds characters that cannot be sent in a header",
            fix="keys are letters, digits and signs of ASCII, on one line: copy it again",
        )
    return key or None


class _Refused(ConfigError):
    status = 0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for one host: it is not carried to wherever that points."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _name(model: str) -> str:
    """Without the path: SGLang names a model that is served from a folder by all of it."""
    parts = Path(model).parts if Path(model).is_absolute() else (model,)
    return parts[-2] if parts[-1] == "checkpoint" and len(parts) > 2 else parts[-1]


def _read(file: Path) -> dict[str, str]:
    """Answers by key. A last line that a kill cut short is passed over, and so is what is no answer: an empty one."""
    found: dict[str, str] = {}
    if not file.exists():
        return found
    text = file.read_text(encoding="utf-8", errors="replace")
    if text and not text.endswith("\n"):
        with file.open("a", encoding="utf-8") as out:
            out.write("\n")
    for line in text.split("\n"):  # texts may hold other ends of lines
        try:
            told = json.loads(line)
            key, answer = told["key"], told["answer"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(key, str) and isinstance(answer, str) and answer.strip():
            found[key] = answer
    return found


def _pause(asked: str | None, left: int) -> float:
    try:
        return min(max(float(asked or ""), 0.0), MOST_SECONDS)
    except ValueError:
        return min(2.0 ** (TRIES - 1 - left), MOST_SECONDS)


def _message(e: urllib.error.HTTPError) -> str:
    """What the body of a refusal says, on one line."""
    raw = e.read(20_000).decode("utf-8", "replace")
    try:
        told = json.loads(raw)
        inner = told.get("error", told) if isinstance(told, dict) else told
        said = inner.get("message", inner) if isinstance(inner, dict) else inner
    except ValueError:
        said = raw
    return " ".join(str(said).split())[:300] or str(e.reason)
