"""An endpoint on 127.0.0.1 that answers as OpenAI's does, by a rule, for tests of what is asked and kept."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sglang_probe.studies.features.prompts import LEFT, RIGHT

Answer = Callable[[dict[str, Any]], str]


def honest(body: dict[str, Any]) -> str:
    """Names the tokens that are marked most often, and judges by whether a text has one of those that are named."""
    system, user = (m["content"] for m in body["messages"])
    texts = [json.loads(found) for found in re.findall(r'"(?:[^"\\]|\\.)*"', user)]
    if "LABEL:" in system:
        spans = [s for text in texts for s in re.findall(f"{LEFT}(.*?){RIGHT}", text, re.DOTALL)]
        often = sorted(set(spans), key=lambda s: (-spans.count(s), s))[:3]
        return "They have something in common.\nLABEL: " + json.dumps(often)
    named, texts = json.loads(texts[0]), texts[1:]
    if LEFT not in "".join(texts):
        return json.dumps([int(any(n in text for n in named)) for text in texts])
    spans_of = [re.findall(f"{LEFT}(.*?){RIGHT}", text, re.DOTALL) for text in texts]
    fits = [[any(n in s for n in named) for s in spans] for spans in spans_of]
    return "So be it: " + json.dumps([int(bool(f) and sum(f) * 2 >= len(f)) for f in fits])


class StubJudge:
    """Answers by `answer`; `before` may send something else, by returning status, headers and body."""

    def __init__(self, answer: Answer = honest, models: tuple[str, ...] = ("stub",)) -> None:
        self.answer, self.models = answer, models
        self.before: Callable[[str], tuple[int, dict[str, str], str] | None] = lambda path: None
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        """That came with what was asked."""
        self.looked: list[str | None] = []
        """That came with a GET."""
        self.lists = ""
        """The only path that lists models; empty: every one."""
        lock, judge = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with lock:
                    judge.looked.append(self.headers.get("Authorization"))
                if judge.lists not in ("", self.path):
                    self._send(404, {}, "")
                    return
                self._send(200, {}, json.dumps({"data": [{"id": m} for m in judge.models]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    judge.asked.append(body)
                    judge.keys.append(self.headers.get("Authorization"))
                    other = judge.before(self.path)
                if other is not None:
                    self._send(*other)
                    return
                message = {"role": "assistant", "content": judge.answer(body)}
                choice = {"message": message, "finish_reason": "stop"}
                self._send(200, {}, json.dumps({"model": body["model"], "choices": [choice]}))

            def _send(self, status: int, headers: dict[str, str], body: str) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> StubJudge:
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
