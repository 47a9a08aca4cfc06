"""The requests of the case, and what is counted of the replies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from dialogues import IDS, KINDS, MOST_NEW, Dialogue, dialogue, is_clean, is_incident, words_of

from sglang_probe.run.run import Run
from sglang_probe.stats.intervals import mean_intervals
from sglang_probe.workload.request import Request, SegmentSpan

SAMPLING: dict[str, Any] = {"max_new_tokens": MOST_NEW, "temperature": 0.0}


def dialogues(counts: dict[str, int], seed: str, names: list[str]) -> list[Dialogue]:
    """Dialogues in an order that mixes kinds."""
    rng = random.Random(seed)
    drawn = [dialogue(kind, rng, names) for kind in KINDS for _ in range(counts[kind])]
    rng.shuffle(drawn)
    return drawn


def requests(
    drawn: Sequence[Dialogue], steer: Sequence[dict[str, Any]] = (), *, name: str = "r", new: int = MOST_NEW
) -> list[Request]:
    """As the engine receives them, called `name:0`, `name:1`, ... A family is an object: texts about it are alike.

    Args:
        new: tokens that a reply has at most.
    """
    params = {
        **SAMPLING,
        "max_new_tokens": new,
        **({"custom_params": {"probe": {"steer": list(steer)}}} if steer else {}),
    }
    made = []
    for i, d in enumerate(drawn):
        ids = tuple(IDS[w] for w in d.prompt)
        made.append(
            Request(i, f"{name}:{i}", ids, (SegmentSpan("prompt", 0, len(ids)),), f"{d.kind} {d.object}", params)
        )
    return made


def number(rid: str) -> int:
    """Which of the dialogues a request is of."""
    return int(rid.rpartition(":")[2])


def replies(run: Run) -> list[list[str]]:
    """In the order of the dialogues."""
    frame = run.requests()
    words = [words_of([int(i) for i in ids]) for ids in frame["output_ids"]]
    found = dict(zip(map(number, frame["rid"]), words, strict=True))
    return [found[i] for i in range(len(found))]


def outcome(plain: Run, run: Run, tests: Sequence[Dialogue]) -> dict[str, Any]:
    """By kind: requests, incidents, clean refusals, replies that differ from the plain ones, and gates that opened."""
    before, after = replies(plain), replies(run)
    gates = run.gates()
    opened = dict(zip(map(number, gates["rid"]), gates["opened"], strict=True))
    told = {}
    for kind in KINDS:
        at = [i for i, d in enumerate(tests) if d.kind == kind]
        told[kind] = {
            "requests": len(at),
            "incidents": sum(is_incident(after[i]) for i in at),
            "clean": sum(is_clean(after[i]) for i in at),
            "changed": sum(after[i] != before[i] for i in at),
        }
        if opened:
            told[kind]["gate_opened"] = sum(bool(opened[i]) for i in at)
    return told


def per_object(plain: Run, run: Run, tests: Sequence[Dialogue], objects: Sequence[str]) -> dict[str, Any]:
    """Mean over objects of the change of the share of clean refusals, with its 95 % interval."""
    before, after = replies(plain), replies(run)
    changes = []
    for thing in objects:
        at = [i for i, d in enumerate(tests) if d.object == thing]
        changes.append(float(np.mean([is_clean(after[i]) - is_clean(before[i]) for i in at])))
    found = mean_intervals(np.array(changes)[:, None])
    effect, low, high = (float(x[0]) for x in (found.estimate, found.low, found.high))
    if len({*changes}) == 1:  # no spread to take an interval of: so many others may have been missed (97.5 %)
        missed = 1 - 0.025 ** (1 / len(changes))
        low, high = max(-1.0, effect - missed), min(1.0, effect + missed)
    return {"effect": effect, "low": low, "high": high, "n": len(changes)}
