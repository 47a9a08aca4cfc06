"""What the online audit finds by rows and by log-probabilities, how often it is wrong, and what it costs a server.

    python bench/audit.py power [--dtype float32] [--right 240] [--each 40]
    python bench/audit.py cost [--rounds 4] [--requests 1920]

`power` asks a real server of `probe-text` requests that reuse a prefix of their own, and audits every one of them: so
many as they are, then so many for each size of what is spoiled. *Spoiled* is one cached entry of about 128, at all
layers, by a mixture with the entry of another position of the same prefix (`tests/gate/plugin/planted.py`; a share of 1
is a flipped slot). `cost` serves the same traffic with and without an audit beside it, in pairs of rounds in random
order.
Prints rows of Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from page import middle_half
from served import scheduler_of, tokens

from sglang_probe.gate.audit import WARM_UP, Audited, Auditor, Candidate, candidates, idle
from sglang_probe.gate.client import KEY_VARIABLE, Client
from sglang_probe.report import markdown
from sglang_probe.run.run import load_run
from tests.end_to_end.live_server import KEY, LiveServer

PLUGIN = Path(__file__).parents[1] / "tests" / "gate" / "plugin"
HOOK_POINTS = ["hook_embed", *(f"blocks.{layer}.hook_resid_post" for layer in range(4))]
SHARES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
PREFIX, TAIL, NEW = 128, 24, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["power", "cost"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--right", type=int, default=240)
    parser.add_argument("--each", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=1920, help="of a round of `cost`, a multiple of 24")
    parser.add_argument("--share", type=float, default=0.05)
    args = parser.parse_args()
    os.environ[KEY_VARIABLE] = KEY
    with tempfile.TemporaryDirectory() as folder:
        planted = Path(folder) / "planted"
        server = _server(Path(folder), planted, args.dtype)
        try:
            server.wait_until_ready()
            if args.what == "power":
                _power(server, planted, args.dtype, args.right, args.each)
            else:
                _cost(server, Path(folder), args.rounds, args.requests, args.share)
        finally:
            server.kill()


def _server(folder: Path, planted: Path, dtype: str) -> LiveServer:
    search = os.pathsep.join([str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])])
    return LiveServer(
        folder,
        *["--dtype", dtype, "--max-total-tokens", "300000", "--max-running-requests", "16"],
        environment={"PLANTED_WRONG_SLOTS": str(planted), "PYTHONPATH": search},
        probe={"hook_points": HOOK_POINTS, "asks": ["rows"]},
        privacy="ids",
        segments={"min_seconds": 0.1},
    )


def _power(server: LiveServer, planted: Path, dtype: str, right: int, each: int) -> None:
    client = Client(server.url)
    facts = client.facts()
    auditor = Auditor(
        client, facts, "cache_salt", room=partial(idle, client), tokens_per_minute=1e12, fetch=client.rows
    )
    number = iter(range(1 << 30))
    rng = random.Random(0)
    head = ["entries", "audits", "alarms", "past T by rows", "by log-probabilities", "first hook point past T"]
    head += ["median distance of rows", "of log-probabilities, nats"]
    rows = []
    for one in _candidates(server, rng, WARM_UP + 1):
        auditor.audit(one)

    def tell(name: str, found: Sequence[Audited]) -> None:
        by_rows = sum(a.rows is not None and a.rows.past for a in found)
        by_nats = sum(a.moved > a.threshold for a in found)
        first = Counter(a.rows.hook_point for a in found if a.rows is not None and a.rows.past)
        alarms = Counter(a.found for a in found)
        print(name, dict(alarms), auditor.without_rows, file=sys.stderr, flush=True)
        alarm = alarms["wrong"] + alarms["was wrong"]
        distance = np.median([a.rows.distance for a in found if a.rows is not None] or [np.nan])
        nats = np.nanmedian([a.moved for a in found])
        named = ", ".join(f"{h} {n}" for h, n in first.most_common()) or "-"
        counts = [str(n) for n in (len(found), alarm, by_rows, by_nats)]
        rows.append([name, *counts, named, f"{distance:.2g}", f"{nats:.2g}"])
        print(rows[-1], file=sys.stderr, flush=True)

    tell("as they are", [auditor.audit(c) for c in _candidates(server, rng, right)])
    for share in SHARES:
        found = []
        for one in _candidates(server, rng, each):
            planted.write_text(f"entry {share} {next(number)}")
            found.append(auditor.audit(one))
            planted.unlink()
        tell(f"one spoiled by {share:g}", found)
    made = _candidates(server, rng, each, planted)
    tell("flipped in the request alone, once", [auditor.audit(c) for c in made])
    t = {h: f"{m.threshold:.2g}" for h, m in _thresholds(auditor)}
    print(f"\n{dtype}; T {auditor.threshold:.2g} nats; of rows {t}\n")
    print(markdown.table(head, rows))


def _thresholds(auditor: Auditor) -> Iterator[tuple[str, Any]]:
    floor = auditor._floor
    for name in floor._pairs:
        yield name, argparse.Namespace(threshold=floor.threshold(name))


def _candidates(server: LiveServer, rng: random.Random, n: int, planted: Path | None = None) -> list[Candidate]:
    """So many requests that reused a prefix each, several at a time, as they were recorded.

    Args:
        planted: the reusing requests themselves get one wrong slot, and what is cached stays right.
    """
    prefixes = [tokens(rng, PREFIX) for _ in range(n)]
    tag = f"{rng.getrandbits(32):08x}"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda p: server.generate([*p[1], *tokens(random.Random(p[0]), TAIL)], n=1), enumerate(prefixes)))
        tails = [tokens(rng, TAIL) for _ in range(n)]
        if planted is not None:
            planted.write_text("1 1.0")
        asked = [(f"{tag}-{i}", [*p, *t]) for i, (p, t) in enumerate(zip(prefixes, tails, strict=True))]
        list(pool.map(lambda a: server.generate(a[1], n=NEW, rid=a[0]), asked))
    if planted is not None:
        planted.unlink()
    found = candidates(load_run(server.flush()))
    return [c for c in found if c.rid.startswith(tag)]


def _cost(server: LiveServer, folder: Path, rounds: int, requests: int, share: float) -> None:
    """Rounds of the same traffic, with an audit beside it and without."""
    rng, order = random.Random(1), random.Random(2)
    found: dict[bool, list[tuple[float, float, int]]] = {False: [], True: []}
    audited = Counter[str]()
    told = []
    for i in range(rounds):
        for with_audit in order.sample([False, True], 2):
            server.admin.post("/probe/flush?cache=true&timeout=30")
            sidecar = _sidecar(server, folder / f"audit-{i}.jsonl", share) if with_audit else None
            found[with_audit].append(_round(server, rng, requests))
            if sidecar is not None:
                sidecar.terminate()
                sidecar.wait(60)
                told += (folder / f"audit-{i}.jsonl").read_text().splitlines()
    audited.update(json.loads(line)["found"] for line in told)
    rows = []
    for name, at in (("requests a second, by clock", 0), ("requests a CPU second of the server", 1)):
        ratios = [b[at] / a[at] for a, b in zip(found[False], found[True], strict=True)]
        rows.append([name, middle_half(ratios)])
    plain, more = (sum(f[2] for f in found[k]) for k in (False, True))
    rows.append(["tokens that the server computed", f"{more / plain:.3f}"])
    print(f"{rounds} pairs of {requests} requests, share {share:g}; audits: {dict(audited)}\n")
    print(markdown.table(["", "with the audit / without (median, middle half)"], rows))


def _sidecar(server: LiveServer, output: Path, share: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sglang_probe", "audit", server.url, str(server.run), "--output", str(output)]
    output.touch()
    quiet = subprocess.DEVNULL
    child = subprocess.Popen([*command, "--share", str(share), "--seed", str(os.getpid())], stdout=quiet, stderr=quiet)
    return child


def _round(server: LiveServer, rng: random.Random, requests: int) -> tuple[float, float, int]:
    """Requests by second, by CPU second of the scheduler, and tokens that it computed meanwhile."""
    scheduler = scheduler_of(server)
    before, cpu, began = server.status()["positions"], sum(scheduler.cpu_times()[:2]), time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(requests // 24):
            prefix = tokens(rng, PREFIX)
            list(pool.map(lambda t, p=prefix: server.generate([*p, *t], n=NEW), [tokens(rng, TAIL) for _ in range(24)]))  # type: ignore[misc]
    wall, cpu = time.perf_counter() - began, sum(scheduler.cpu_times()[:2]) - cpu
    after = server.status()["positions"]
    return requests / wall, requests / cpu, sum(after[k] - before[k] for k in ("computed", "decode"))


if __name__ == "__main__":
    main()
