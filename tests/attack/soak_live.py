"""A round of the soak beside a server: several lives of one server that records, each of which meets something.

Serving comes first: whatever happens to the disk or to the clock, every request must be answered by SGLang, and the
recording must begin again by itself once the disk is whole. Every segment that is there at the end must verify, and
what was answered in a life that met no failing disk and no signal must be in the ledger, token for token.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from sglang_probe.engine.live.segments import RECORDING, existing
from sglang_probe.run import schema
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.verify import verify
from tests.attack.mishaps import ALL, DISK, ENDED, KILLS, SIGNALS, Mishap, mishaps_of, recorder_of
from tests.attack.plan import Plan
from tests.attack.soak_harvest import Asked, configuration_of, requests_of
from tests.end_to_end.live_server import LiveServer

KINDS = tuple(kind for kind in ALL if kind != KILLS[1])
FAULTY = 3
"""Lives that meet something; one more does not."""
BUSY = 503
"""SGLang's status for a queue that is full (`max_queued_requests`): an answer, and nothing of it is recorded."""
_NO_ENDS = (schema.CONTINUES, schema.ENDED_EARLIER, schema.INTERRUPTED)


@dataclass
class Life:
    """What clients of one life of the server were told."""

    exact: bool
    """Whether all that was answered must be in the ledger."""
    served: bool
    """Whether all must have been answered."""
    answers: dict[str, list[int]] = field(default_factory=dict)
    """Output by request id."""
    busy: int = 0
    unanswered: dict[str, str] = field(default_factory=dict)
    """Why not, by request id."""


class LiveRound:
    """Several lives of one server.

    Args:
        folder: an empty folder of its own.
        shim: the library of `faults.c`.
    """

    def __init__(self, number: int, count: int, folder: Path, shim: Path) -> None:
        self.number, self.folder, self.shim = number, folder, shim
        self.run = folder / "run"
        each = -(-count // (FAULTY + 1))
        asked = requests_of(number, each * (FAULTY + 1))
        self.shares = [
            {f"life{n}-{i}": r for i, r in enumerate(asked[n * each : (n + 1) * each])} for n in range(FAULTY + 1)
        ]
        self.met: list[tuple[str, str]] = []
        self.missed: list[str] = []
        self.lives: list[Life] = []
        self.wrong: list[str] = []

    def play(self) -> dict[str, Any]:
        """Do it, and say what came of it."""
        plan, server = configuration_of(self.number, sum(map(len, self.shares)))
        arguments = [*_arguments(server), *(["--disable-radix-cache"] if plan.cache == "off" else [])]
        for share, mishap in zip(self.shares, [*mishaps_of(self.number, FAULTY, KINDS), None], strict=True):
            self._live(share, mishap, plan, arguments)
        asked = {rid: r for share in self.shares for rid, r in share.items()}
        wrong, told = judge([load_run(p) for p in existing(self.run)], self.lives, asked)
        facts = {"met": self.met, "missed": self.missed, "options": plan.options}
        return {"kind": "live", **facts, "wrong": [*self.wrong, *wrong], "counts": told}

    def _live(self, share: dict[str, Asked], mishap: Mishap | None, plan: Plan, arguments: Sequence[str]) -> None:
        n, kind = len(self.lives), mishap.kind if mishap else None
        mark, switch = self.folder / f"mark-{n}", self.folder / "broken"
        env = mishap.environment(self.shim, self.run, mark, switch) if mishap else {}
        life = Life(exact=kind not in (*SIGNALS, *DISK), served=kind not in SIGNALS)
        self.lives.append(life)
        probe = {"hook_points": plan.hook_points, "checkpoint_seconds": 0.5}
        segments = {"max_requests": 40, "patience": 1.0}
        server = LiveServer(
            self.folder,
            *arguments,
            environment=plan.env,
            read_late=env,
            probe=probe,
            privacy="ids",
            segments=segments,
            queue=1 << 14,
        )
        try:
            if kind in SIGNALS and mishap and mishap.starting:
                time.sleep(mishap.wait)
                self._signal(server, mishap)
                return
            server.wait_until_ready(300)
            if mishap and kind in SIGNALS:
                timer = threading.Timer(mishap.wait, self._signal, (server, mishap))
                timer.start()
                _ask(server, share.items(), plan.concurrency, life)
                timer.join()
                return
            third = -(-len(share) // 3)
            for k in range(3):
                if kind in DISK:
                    switch.touch() if k == 1 else switch.unlink(missing_ok=True)
                _ask(server, list(share.items())[k * third : (k + 1) * third], plan.concurrency, life)
            if mishap:
                self.met.append((mishap.kind, "serving")) if mark.exists() else self.missed.append(mishap.kind)
            self._records_again(server)
            server.terminate(120)
        except Exception as e:
            self.wrong.append(f"life {n} ({kind or 'nothing'}): {type(e).__name__}: {str(e)[-600:]}")
        finally:
            switch.unlink(missing_ok=True)
            server.kill()
            for client in (server.http, server.admin, server.anybody):
                client.close()
            server.log.rename(self.folder / f"server-{n}.log")

    def _records_again(self, server: LiveServer) -> None:
        deadline = time.monotonic() + 150
        while not (status := server.status())["recording"]:
            if time.monotonic() > deadline:
                self.wrong.append(f"life {len(self.lives) - 1}: no recording 150 s later: {status['reason']}")
                return
            time.sleep(0.2)

    def _signal(self, server: LiveServer, mishap: Mishap) -> None:
        if server.process.poll() is not None:
            self.missed.append(mishap.kind)
            return
        engine = recorder_of(self.run)
        kind = KILLS[2] if mishap.kind == KILLS[0] and engine is None else mishap.kind
        self.met.append((kind, "serving" if engine else "starting"))
        with suppress(ProcessLookupError):
            if kind == KILLS[0] and engine:
                os.kill(engine, signal.SIGKILL)
            elif kind == ENDED:
                server.process.send_signal(signal.SIGTERM)
            else:
                os.killpg(server.process.pid, signal.SIGKILL)
        with suppress(Exception):  # the server ends by itself, or is killed by who called
            server.process.wait(60)


def _ask(server: LiveServer, share: Iterable[tuple[str, Asked]], concurrency: int, life: Life) -> None:
    """Send requests, some at a time, and note what was answered."""

    def one(item: tuple[str, Asked]) -> None:
        rid, asked = item
        params = {"max_new_tokens": asked["max_new_tokens"], "temperature": 1.0}
        body = {"rid": rid, "input_ids": asked["prompt_ids"], "sampling_params": params}
        try:
            answer = server.http.post("/generate", json=body, timeout=300)
        except httpx.HTTPError as e:
            life.unanswered[rid] = f"{type(e).__name__}: {e}"
            return
        if answer.status_code == 200:
            life.answers[rid] = answer.json()["output_ids"]
        elif answer.status_code == BUSY:
            life.busy += 1
        else:
            life.unanswered[rid] = f"{answer.status_code}: {answer.text[:200]}"

    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(one, share))


def _arguments(server: dict[str, Any]) -> list[str]:
    """Server arguments as a command line takes them."""
    words = []
    for name, value in server.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def judge(segments: Sequence[Run], lives: Sequence[Life], asked: dict[str, Asked]) -> tuple[list[str], dict[str, int]]:
    """What is wrong, in words, and what the segments hold.

    Args:
        segments: in order; the last life of the server closed the last one.
        asked: by request id.
    """
    wrong: list[str] = []
    ends: Counter[str] = Counter()
    outputs: dict[str, list[int]] = {}
    counts = {"requests": len(asked), "segments": len(segments), "positions": 0, "rows": 0}
    for run in segments:
        name, status = run.path.name, run.manifest["status"]
        if status == RECORDING:
            wrong.append(f"{name} was never closed")
            continue
        if violations := [f"{name} ({status}), {c.name}: {c.violation}" for c in verify(run) if not c.holds]:
            wrong += violations
            continue
        spans = run.spans()
        counts["positions"] += int((spans["end"] - spans["start"]).sum())
        counts["rows"] += run.row_count()
        if run.manifest.get("unaccounted"):
            wrong.append(f"{name} gave up requests: {str(run.manifest['unaccounted'])[:300]}")
        for r in run.requests().to_dict("records"):
            if r["rid"] not in asked or r["finish_reason"] in _NO_ENDS:
                continue
            ends[r["rid"]] += 1
            outputs[r["rid"]] = [] if r["output_ids"] is None else list(r["output_ids"])
            if r["prompt_ids"] is not None and list(r["prompt_ids"]) != asked[r["rid"]]["prompt_ids"]:
                wrong.append(f"{name}: {r['rid']} is not what was asked")
    if twice := sorted(rid for rid, n in ends.items() if n > 1):
        wrong.append(f"{len(twice)} requests ended twice, the first is {twice[0]}")
    answered = {rid: ids for life in lives for rid, ids in life.answers.items()}
    if other := sorted(rid for rid in answered.keys() & outputs.keys() if answered[rid] != outputs[rid]):
        wrong.append(f"{len(other)} requests have another output than was answered, the first is {other[0]}")
    for n, life in enumerate(lives):
        if life.served and life.unanswered:
            rid, why = next(iter(life.unanswered.items()))
            wrong.append(f"life {n}: {len(life.unanswered)} requests were not answered, the first is {rid}: {why}")
        if life.exact and (lost := sorted(life.answers.keys() - ends.keys())):
            wrong.append(f"life {n}: {len(lost)} answered requests are in no segment, the first is {lost[0]}")
    counts["answered"], counts["busy"] = len(answered), sum(life.busy for life in lives)
    counts["recorded"] = len(answered.keys() & ends.keys())
    return wrong, counts
