"""What a monitor and a clamp do for one decode step, timed alone: CPU microseconds of the thread, without an engine.

    python bench/monitor_parts.py

The machine may be busy meanwhile: what is taken is the own CPU time of the thread, the least of five series. Divide by
the time of a decode step; `bench/monitor.py` measures that quotient in engines.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from monitor import EVERY, made_up_profile
from page import machine
from paired import OUTPUT, ROWS, Condition

from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments.monitor import Watching
from sglang_probe.engine.ledger.facts import Commit, ForwardPlan, Watched
from sglang_probe.engine.live.monitor import LiveMonitor
from sglang_probe.monitor.config import MonitorConfig
from sglang_probe.monitor.stored import read_profile, reading_of
from sglang_probe.steer_ask import Steer
from sglang_probe.steering.apply import add_rows, bank_of, changes
from sglang_probe.steering.plan import rows_of
from sglang_probe.steering.resolve import spec_of
from tests.end_to_end.steering import WIDTH, make_library

SCHEDULER, WRITER = "scheduler's thread", "writer's thread"
READ = {thread: f"{thread}, a step whose {ROWS} rows are read" for thread in (SCHEDULER, WRITER)}
JUDGED = f"{WRITER}, a request that is judged"
RIDS = [f"r{i}" for i in range(ROWS)]


def timed(work: Callable[[], object], count: int) -> float:
    """CPU microseconds of one call."""
    found = []
    for _ in range(5):
        began = time.thread_time()
        for _ in range(count):
            work()
        found.append((time.thread_time() - began) / count * 1e6)
    return min(found)


def plan(step: int) -> ForwardPlan:
    """A decode step of every request."""
    prompt, n = Condition.prompt, ROWS
    starts, ends = [prompt + step] * n, [prompt + step + 1] * n
    return ForwardPlan(1, "decode", RIDS, starts, ends, [True] * n, [0] * n, [prompt] * n, [None] * n, n)


def monitored(folder: Path) -> dict[str, float]:
    """Of the scheduler's thread, and of the writer's."""
    given = made_up_profile(folder / "profile")
    stored = read_profile(folder / "profile")
    live = LiveMonitor(MonitorConfig(**given), stored.watch, reading_of(stored.watch, Path(given["sae"]), {}), stored)
    watching = Watching(EngineProbeConfig.model_validate({"run": str(folder), "live": {}, "monitor": given}))
    watching._watch, watching._live = stored.watch, live
    reqs, x_ND = [SimpleNamespace() for _ in range(ROWS)], torch.randn(ROWS, WIDTH)
    read, others = plan(0), plan(1)
    watching.launch(reqs, [], others)
    assert watching._chosen is None
    watching.launch(reqs, [], read)
    chosen = watching._chosen
    assert chosen is not None
    assert len(chosen.at) == ROWS
    order = 0

    def after() -> None:
        watching._chosen, watching._x_ND = chosen, x_ND
        watching.after(SimpleNamespace(plan=read, logits=None))

    def handed(watched: Watched | None, requests: list[Any]) -> None:
        nonlocal order
        live.read(Commit(watched=watched, requests=requests, order=order), "segment")
        order += 1

    def rows() -> None:
        probability = np.full(ROWS, 1 / EVERY)
        handed(Watched(RIDS, [0] * ROWS, [0] * ROWS, probability, None, x_ND, 1, 0), [])

    def judged() -> None:
        of = live._open.setdefault("one", type(live._open[RIDS[0]])())
        of.values, of.far, of.weight = list(values), list(far), [1.0] * len(values)
        live._judged("one", of, live._segments["segment"])

    told = {
        f"{SCHEDULER}, a step without a row": timed(lambda: watching.launch(reqs, [], others), 1000),
        READ[SCHEDULER]: timed(lambda: watching.launch(reqs, [], read), 1000)
        + timed(lambda: x_ND[chosen.rows.tolist()].clone(), 1000)
        + timed(after, 1000),
        f"{WRITER}, a step without a row": timed(lambda: handed(None, []), 1000),
        READ[WRITER]: timed(rows, 100),
    }
    values = live._open[RIDS[0]].values[: OUTPUT // EVERY]
    far = live._open[RIDS[0]].far[: OUTPUT // EVERY]
    told[JUDGED] = timed(judged, 200)
    assert live.off is None
    assert live.requests == 5 * 200
    return told


def clamped(folder: Path) -> dict[str, float]:
    """Of the scheduler's thread, by the number of rows that are clamped."""
    library = make_library(folder / "library")
    bank, numbers = bank_of(library.values(), device="cpu")
    assert bank is not None
    entry = {"vector": "feature", "op": "clamp", "strength": 0, "phases": ["decode"]}
    spec = spec_of([Steer.model_validate(entry)], library, where="bench")
    x_ND, told = torch.randn(ROWS, WIDTH), {}
    starts, ends = [Condition.prompt + 3] * ROWS, [Condition.prompt + 4] * ROWS
    for n in (1, ROWS):
        specs = [spec if i < n else None for i in range(ROWS)]

        def planned(specs: list[Any] = specs) -> Any:
            return rows_of(starts, ends, [Condition.prompt] * ROWS, specs, numbers)

        (passes,) = planned().values()
        to_ND = x_ND.clone()
        told[f"{SCHEDULER}, a step with {n} of {ROWS} rows clamped"] = timed(planned, 500) + timed(
            lambda passes=passes, to_ND=to_ND: add_rows(to_ND, *changes(x_ND, passes, bank)), 500
        )
    return told


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        told = monitored(Path(name)) | clamped(Path(name))
    print(section(machine(), told))


def section(where: str, told: Mapping[str, float]) -> str:
    """The section of the page, of CPU microseconds by what is done."""
    lines = [
        f"{where}. `python bench/monitor_parts.py`, the least of five series; {ROWS} requests of width {WIDTH}, an SAE "
        "of 1,024 latents.\n",
        "| work, timed alone | CPU microseconds |\n|---|---|",
        *(f"| {what} | {each:.0f} |" for what, each in told.items()),
    ]
    # Of a step that is read, and of the others; a request is judged once, after all of its steps.
    both = [(told[READ[t]] + (EVERY - 1) * told[f"{t}, a step without a row"]) / EVERY for t in READ]
    scheduler, writer = both[0], both[1] + told[JUDGED] * ROWS / OUTPUT
    lines.append(
        f"\nWith a monitor that reads every {EVERY}th step, a mean step costs {scheduler:.0f} microseconds of the "
        f"scheduler's thread and {writer:.0f} of the writer's, judging included."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
