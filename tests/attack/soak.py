"""Harvests and servers that meet kills and faults: `python -m tests.attack.soak --out DIR --hours H`.

Each round follows from its number: a configuration of the engine (`plan.py`), requests that share prefixes, and what
goes wrong (`mishaps.py`). Two of three rounds are harvests, resumed until they are complete (`soak_harvest.py`); every
third is a live recording beside SGLang's server (`soak_live.py`).

A finished round leaves `DIR/round-N.json` and is not done again, so that a soak can be interrupted and extended. The
folder of a round stays only if something is wrong. Exit code 1 if anything is. Needs Linux and a C compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.attack.mishaps import ALL, KILLS, build_shim
from tests.attack.outcome import ROOT
from tests.attack.soak_harvest import HarvestRound
from tests.attack.soak_live import LiveRound
from tests.warm.commands import shared

HEADING = "## The run\n"
REQUESTS, KILLED = 1_000_000, 1_000
"""What the soak is for."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results of rounds")
    parser.add_argument("--hours", type=float, default=1.0, help="no round begins after so many hours (default 1)")
    parser.add_argument("--requests", type=int, default=200, help="requests in each round (default 200)")
    parser.add_argument("--first", type=int, default=1, help="number of the first round (default 1)")
    parser.add_argument("--rounds", type=int, help="how many at most (default: as many as the hours allow)")
    parser.add_argument("--document", type=Path, help="a Markdown file whose part after `## The run` is written anew")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    shim = build_shim(args.out)
    # Of the process that commands are forked from as well: the library asks for its settings at each call.
    os.environ["LD_PRELOAD"] = str(shim)
    until, number = time.monotonic() + 3600 * args.hours, args.first
    while time.monotonic() < until and (args.rounds is None or number < args.first + args.rounds):
        path = args.out / f"round-{number}.json"
        if not path.exists():
            record = play(number, args.requests, args.out / f"round-{number}", shim)
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(said(record), flush=True)
        number += 1
    shared().close()
    records = sorted((json.loads(p.read_text()) for p in args.out.glob("round-*.json")), key=lambda r: r["round"])
    if not records:
        print("no round was done")
        return 0
    print(page(records))
    if args.document:
        above, heading, _ = args.document.read_text().partition(HEADING)
        args.document.write_text(f"{above}{heading}\n{page(records)}\n")
    return 1 if any(r["wrong"] for r in records) else 0


def play(number: int, requests: int, folder: Path, shim: Path) -> dict[str, Any]:
    """One round, from its number; its folder is left if something is wrong."""
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kind = LiveRound if number % 3 == 0 else HarvestRound
    record = kind(number, requests, folder, shim).play()
    if not record["wrong"]:
        shutil.rmtree(folder)
    return {"round": number, "seconds": round(time.monotonic() - began, 1), **record, "where": where()}


def where() -> dict[str, str | None]:
    """What was soaked, on what."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = ("sglang", "torch")
    return {
        "commit": done.stdout.strip() or None,
        "versions": ", ".join([*(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}"]),
        "device": f"CPU ({platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()})",
    }


def said(record: dict[str, Any]) -> str:
    """A round in one line."""
    met = ", ".join(f"{kind} while {when}" for kind, when in record["met"]) or "nothing"
    came = "; ".join(record["wrong"]) or f"{record['counts']['positions']:,} positions, all as they must be"
    return f"round {record['round']}, {record['kind']}, {record['seconds']:.0f} s: {met}: {came}"


def page(records: Sequence[dict[str, Any]]) -> str:
    """What all rounds came to, in Markdown."""

    def total(name: str, kind: str | None = None) -> int:
        return sum(r["counts"].get(name, 0) for r in records if kind in (None, r["kind"]))

    def each(name: str) -> str:
        return "; ".join(sorted({str(r["where"][name]) for r in records}))

    met = Counter((kind, when) for r in records for kind, when in r["met"])
    missed = Counter(kind for r in records for kind in r["missed"])
    kills = sum(n for (kind, _), n in met.items() if kind in KILLS)
    hours = sum(r["seconds"] for r in records) / 3600
    harvests = sum(r["kind"] == "harvest" for r in records)
    wrong = [r for r in records if r["wrong"]]
    requests = total("requests")
    lines = [
        f"{len(records)} rounds ({harvests} harvests, {len(records) - harvests} live recordings) in {60 * hours:.0f} "
        f"minutes: {requests:,} requests, {total('positions'):,} positions, {total('rows'):,} numbered rows, {kills} "
        f"SIGKILLs. Rounds in which something was wrong: {len(wrong)}.",
        "",
        f"Of the harvests' requests {total('asked_again'):,} were asked by a command that resumed, and "
        f"{total('refused'):,} are recorded as refused (by SGLang, or because an engine was killed twice while the "
        f"request was in flight, the second time alone). Of the {total('requests', 'live'):,} requests to servers "
        f"{total('answered'):,} were answered, {total('busy'):,} met a full queue, and {total('recorded'):,} of the "
        f"answered ones are in {total('segments'):,} segments. The answered requests that are in none met a server "
        "that got a signal, a disk that failed, or a segment that is named below.",
        "",
        f"The aim is a million requests and a thousand kills: this is {requests / REQUESTS:.2%} and "
        f"{kills / KILLED:.1%} of it. {_at_this_rate(hours, requests, kills)}",
        "",
        f"Device: {each('device')}. Versions: {each('versions')}. Commit: {each('commit')}.",
        "",
        "| what went wrong | while starting | while serving | drawn, but the command had ended by then |",
        "|---|---|---|---|",
        *(f"| {k} | {met[k, 'starting']} | {met[k, 'serving']} | {missed[k]} |" for k in ALL),
    ]
    if wrong:
        lines += ["", *(f"* round {r['round']} ({r['kind']}): {'; '.join(r['wrong'])}" for r in wrong)]
    return "\n".join(lines)


def _at_this_rate(hours: float, requests: int, kills: int) -> str:
    def takes(aim: int, done: int) -> str:
        return f"{hours * aim / done:,.0f} hours" if done else "a time that this does not tell"

    return (
        f"At the rate of these rounds a million requests would take {takes(REQUESTS, requests)} and a thousand kills "
        f"{takes(KILLED, kills)}."
    )


if __name__ == "__main__":
    sys.exit(main())
