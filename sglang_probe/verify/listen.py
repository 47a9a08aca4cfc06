"""Recording witnesses of a running server: its KV events as they are published, and `/metrics` before and after.

SGLang publishes events over ZMQ where it was started with `--kv-events-config '{"publisher": "zmq", "endpoint":
"tcp://*:5557", "topic": "kv"}'`: three frames, topic, sequence number (8 bytes, big-endian), and a batch in msgpack
(`disaggregation/kv_events.py`). Batches that were published before somebody listened are lost, and so are those that a
slow listener misses: the sequence numbers say so.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from sglang_probe.errors import ConfigError, ProbeError

EVENTS, BEFORE, AFTER = "events.jsonl", "before.prom", "after.prom"
_POLL_MS = 200


def listen(
    endpoint: str,
    folder: Path,
    *,
    until: Callable[[], bool],
    metrics: str | None = None,
    ready: Callable[[], None] = lambda: None,
) -> int:
    """Write what is published into `folder` until `until` says so; returns the number of batches.

    Args:
        endpoint: of the publisher, e.g. `tcp://127.0.0.1:5557`.
        until: asked several times a second.
        metrics: address of the server, whose `/metrics` are kept as they were before and after.
        ready: called once events are listened to.

    Raises:
        ConfigError: pyzmq or msgspec is missing, or an address is wrong.
        ProbeError: a batch was missed.
    """
    try:
        import msgspec

        zmq: Any = import_module("zmq")  # its names come from submodules, which type checkers are told to skip
    except ModuleNotFoundError as e:
        raise ConfigError(f"{e.name} is missing", fix="pip install pyzmq msgspec; SGLang brings both") from e
    folder.mkdir(parents=True, exist_ok=True)
    if metrics is not None:
        (folder / BEFORE).write_text(_scrape(metrics), encoding="utf-8")
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    batches, following, missed = 0, None, 0
    try:
        socket.setsockopt(zmq.RCVHWM, 0)  # a batch that is dropped would be a false alarm later
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as e:
            raise ConfigError(f"`{endpoint}`: {e}", fix="give it as tcp://127.0.0.1:5557") from e
        ready()
        with (folder / EVENTS).open("w", encoding="utf-8") as out:
            last = False
            while not last:
                try:
                    last = until()
                    there = socket.poll(_POLL_MS)
                except KeyboardInterrupt:  # how a user says that it is enough; what is in flight is still read
                    last, there = True, socket.poll(_POLL_MS)
                while there:
                    _topic, number, payload = socket.recv_multipart()
                    seq = int.from_bytes(number, "big")
                    missed += max(0, seq - following) if following is not None else 0
                    following = seq + 1
                    batch: list[Any] = msgspec.msgpack.decode(payload)
                    out.write(json.dumps({"ts": batch[0], "events": batch[1]}) + "\n")
                    batches += 1
                    there = socket.poll(0 if not last else _POLL_MS)
    finally:
        socket.close(0)
        context.term()
    if metrics is not None:
        (folder / AFTER).write_text(_scrape(metrics), encoding="utf-8")
    if missed:
        raise ProbeError(
            f"{missed} batches of KV events were missed: {folder / EVENTS} is no witness", fix="record anew"
        )
    return batches


def for_seconds(seconds: float) -> Callable[[], bool]:
    """`until` for so long; infinity: until interrupted."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def _scrape(url: str) -> str:
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/metrics", timeout=30) as answer:
            return str(answer.read().decode("utf-8"))
    except OSError as e:
        raise ConfigError(f"no /metrics at {url}: {e}", fix="start the server with --enable-metrics") from e
