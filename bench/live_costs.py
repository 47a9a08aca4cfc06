"""What a live server pays for the causes of computed tokens, and for attributes on its traces: ratios of throughput.

    python bench/live_costs.py causes [--rounds 12]
    python bench/live_costs.py traces [--rounds 12]     # needs the extra `otel`

Two real servers of `probe-text`. In each round every condition serves the same traffic once, in random order; while one
serves the others have nothing to do. The segment is closed in the middle, so that its causes are found while requests
come. A ratio is that of one round; printed is the median of the rounds with their middle half. *By clock* contains
whatever process takes of the machine's cores; the CPU seconds are those of the scheduler process alone.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from page import middle_half
from served import scheduler_of, tokens

from sglang_probe.engine.live.causes import COMMAND
from sglang_probe.report import markdown
from tests.end_to_end.live_server import LiveServer

FAMILIES, EACH, PREFIX, TAIL, NEW = 8, 24, 128, 24, 4
Found = dict[str, list[tuple[float, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["causes", "traces"])
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (_causes if args.what == "causes" else _traces)(Path(folder), args.rounds)


def _causes(folder: Path, rounds: int) -> None:
    servers = [_server(folder, name, causes=name == "causes") for name in ("plain", "causes")]
    plain, causes = servers

    def asked() -> None:
        plain.admin.get("/probe/why", params={"by": "session"}, timeout=150)

    conditions = {
        "without": lambda seed: _round(plain, seed),
        "again without": lambda seed: _round(plain, seed),
        "`causes: true`": lambda seed: _round(causes, seed),
        "`GET /probe/why` asked once": lambda seed: _round(plain, seed, asked),
    }
    _compare(servers, conditions, rounds)


def _traces(folder: Path, rounds: int) -> None:
    from tests.end_to_end.collector import Collector

    collector = Collector()
    traced = ("--enable-trace", "--otlp-traces-endpoint", collector.endpoint)
    eager = {"OTEL_EXPORTER_OTLP_TIMEOUT": "2"}
    servers = [_server(folder, name, *traced, environment=eager, traces=name == "ours") for name in ("plain", "ours")]
    plain, ours = servers
    conditions = {
        "SGLang's spans alone": lambda seed: _round(plain, seed),
        "again alone": lambda seed: _round(plain, seed),
        "`traces: true`": lambda seed: _round(ours, seed),
    }
    try:
        _compare(servers, conditions, rounds)
    finally:
        collector.stop()


def _compare(
    servers: list[LiveServer], conditions: dict[str, Callable[[int], tuple[float, float]]], rounds: int
) -> None:
    found: Found = {name: [] for name in conditions}
    order = random.Random(0)
    try:
        for server in servers:
            server.wait_until_ready()
            _round(server, -1)
        for i in range(rounds):
            for name in order.sample(list(conditions), len(conditions)):
                found[name].append(conditions[name](i))
    finally:
        for server in servers:
            server.kill()
    base, *others = conditions
    rows = []
    for name in others:
        told = []
        for at in (0, 1):
            ratios = [b[at] / a[at] for a, b in zip(found[base], found[name], strict=True)]
            told.append(middle_half(ratios))
        rows.append([name, *told])
    print(f"{rounds} rounds of {FAMILIES * EACH} requests each, {os.cpu_count()} cores; against: {base}\n")
    print(markdown.table(["", "requests by clock", "requests a CPU second of the scheduler"], rows))


def _server(
    folder: Path, name: str, *arguments: str, environment: dict[str, str] | None = None, **live: object
) -> LiveServer:
    (folder / name).mkdir()
    live = {"privacy": "ids", "segments": {"min_seconds": 0.0}, **live}
    return LiveServer(folder / name, *arguments, environment=environment, **live)


def _round(server: LiveServer, seed: int, meanwhile: Callable[[], None] | None = None) -> tuple[float, float]:
    """Requests by second, and by CPU second of the scheduler. Begins with an empty cache, ends when nothing runs."""
    rng = random.Random(seed)
    server.admin.post("/probe/flush?cache=true&timeout=30")
    tree = psutil.Process(server.process.pid)
    scheduler = scheduler_of(server)
    _settle(tree)
    beside = threading.Thread(target=meanwhile or (lambda: None))
    began, cpu = time.perf_counter(), sum(scheduler.cpu_times()[:2])
    with ThreadPoolExecutor(4) as pool:
        for i in range(FAMILIES):
            if i == FAMILIES // 2:
                server.flush()
                beside.start()
            prefix = tokens(rng, PREFIX)
            prompts = [[*prefix, *tokens(rng, TAIL)] for _ in range(EACH)]
            list(pool.map(lambda prompt: server.generate(prompt, n=NEW), prompts))
    wall, cpu = time.perf_counter() - began, sum(scheduler.cpu_times()[:2]) - cpu
    beside.join()
    return FAMILIES * EACH / wall, FAMILIES * EACH / cpu


def _settle(tree: psutil.Process) -> None:
    """Until no process finds causes."""
    while any(COMMAND[-1] in " ".join(_command(p)) for p in tree.children(recursive=True)):
        time.sleep(0.1)


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
