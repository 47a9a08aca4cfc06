"""What benchmarks of a live server share."""

from __future__ import annotations

import random

import psutil

from tests.end_to_end.live_server import LiveServer


def tokens(rng: random.Random, n: int) -> list[int]:
    """Random ones of `probe-text`."""
    return [rng.randrange(10, 3000) for _ in range(n)]


def scheduler_of(server: LiveServer) -> psutil.Process:
    """The process of its scheduler, whose CPU seconds are those of its steps."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(p for p in children if "scheduler" in " ".join(p.cmdline()))
