"""The client of `GET /probe/rows`: how long it asks, and when it gives up."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from safetensors.torch import save

from sglang_probe import client
from sglang_probe.client import RowsError, ask_rows, fetch_rows

Serve = Callable[..., tuple[str, list[float]]]
TOLD = {"spans": [], "missing": {}, "rid": "r", "prompt_len": 2}
FILE = save({"position": torch.arange(2)}, metadata={"probe": json.dumps(TOLD)})


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Answers with these statuses, one after the other, after having waited as long as it was asked to."""
    servers = []

    def start(*statuses: int, clock: list[float], waits: bool = True) -> tuple[str, list[float]]:
        asked: list[float] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(float(parse_qs(urlsplit(self.path).query)["timeout"][0]))
                status = statuses[min(len(asked), len(statuses)) - 1]
                clock[0] += asked[-1] if waits and status == 404 else 0
                self.send_response(status)
                self.end_headers()
                self.wfile.write(FILE if status == 200 else json.dumps({"reason": "as planned"}).encode())

            def log_message(self, *_args: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(client.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_it_asks_again_for_as_long_as_it_was_told(serve: Serve, clock: list[float]) -> None:
    url, asked = serve(404, 404, 200, clock=clock)
    found = fetch_rows(url, ask_rows(), timeout=60)
    np.testing.assert_array_equal(found.position, [0, 1])
    assert asked == [20, 20, 20]


def test_it_gives_up_in_time(serve: Serve, clock: list[float]) -> None:
    url, asked = serve(404, clock=clock)
    with pytest.raises(RowsError, match="404: as planned"):
        fetch_rows(url, ask_rows(), timeout=45)
    assert asked == [20, 20, 5]


@pytest.mark.parametrize(("status", "waits"), [(404, False), (410, True), (503, True)])
def test_what_will_not_come_is_not_asked_for_again(serve: Serve, clock: list[float], status: int, waits: bool) -> None:
    url, asked = serve(status, clock=clock, waits=waits)
    with pytest.raises(RowsError, match="as planned"):
        fetch_rows(url, ask_rows(), timeout=60)
    assert len(asked) == 1


def test_a_busy_server_is_asked_again_after_a_pause(serve: Serve, clock: list[float]) -> None:
    url, _ = serve(429, 429, 200, clock=clock)
    assert fetch_rows(url, ask_rows(), timeout=5).rid == "r"
    assert clock[0] == 2 * client._PAUSE
