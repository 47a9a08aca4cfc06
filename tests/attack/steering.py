"""Random steered and plain traffic against a real engine: `python -m tests.attack.steering --seed 7 --requests 60`.

Everybody is served three times over in one engine: alone, with nothing reused and nothing published; and together, with
chunks, mixed batches, retractions and one prefix cache for all. What a request computes together must be what it
computes alone: the tokens, and every row of every layer up to rounding. Second turns hold the first one's output, which
steered entries are of, and are steered otherwise or not at all.

What may differ is the last bits of a sum, because a matrix product depends on how many rows it has; fp32 keeps that
below 1e-5. An entry of other interventions is off by 1e-2 and more (`--sabotage` shows it).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.harvest.config import Recording
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared, prepare
from sglang_probe.policy.arm import Arm
from sglang_probe.run.run import Run
from sglang_probe.stats.distance import row_distance
from sglang_probe.verify.verify import verify
from sglang_probe.workload.build import Workload
from sglang_probe.workload.request import Request, SegmentSpan
from tests.end_to_end.steering import POINTS, make_library

SAME = 1e-4
"""Largest relative error of a row that is the same but for rounding."""
_NEW = 10
_SERVER = {
    "chunked_prefill_size": 32,
    "enable_mixed_chunk": True,
    "max_running_requests": 6,
    "max_total_tokens": 1024,  # entries are evicted
}


@dataclass
class Outcome:
    """What was compared, and what was wrong."""

    requests: int = 0
    steered: int = 0
    positions: int = 0
    """Computed positions whose row was compared, plain and steered."""
    plain_positions: int = 0
    reused: int = 0
    reused_steered: int = 0
    retracted: int = 0
    gates: str = ""
    """Open and closed ones."""
    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "wrong": len(self.wrong), "first": self.wrong[:3]}


def traffic(rng: random.Random, count: int) -> list[Request]:
    """Prompts that are prefixes of each other's, or branch off, with and without interventions."""
    # Of all positions, so that requests share what they left; with a late onset; and others, which share with few.
    up = {"vector": "up", "strength": 30}
    pool = [[up], [{"vector": "late", "op": "project_out"}], [{**up, "phases": ["decode"]}]]
    pool += [[{**up, "prompt_window": [-20, None]}], *(steer(rng, 60) for _ in range(2))]
    gate = {"phases": ["decode"], "gate": {"by": "probe", "probe": "fires"}}
    pool += [[{**up, **gate}], [{"vector": "late", "strength": 20, **gate}, {**up, "prompt_window": [-9, None]}]]
    roots = [[rng.randrange(10, 3000) for _ in range(rng.randrange(30, 110))] for _ in range(3)]
    requests = []
    for i in range(count):
        root = rng.choice(roots)
        ids = root[: rng.randrange(len(root) // 2, len(root) + 1)]
        if rng.random() < 0.5:
            ids = ids + [rng.randrange(10, 3000) for _ in range(rng.randrange(1, 12))]
        entries = rng.choice([*[[]] * 5, *pool, steer(rng, len(ids))])
        requests.append(request(i, f"a{i}", ids, entries))
    return requests


def turns(rng: random.Random, first: Sequence[Request], outputs: Mapping[str, Sequence[int]]) -> list[Request]:
    """Second turns: prompt and output of the first, a few tokens more, and other interventions."""
    chosen = rng.sample(list(first), len(first) // 2)
    requests = []
    for i, r in enumerate(chosen):
        ids = [*r.prompt_ids, *map(int, outputs[r.rid]), *(rng.randrange(10, 3000) for _ in range(rng.randrange(4)))]
        same = r.sampling_params.get("custom_params", {}).get("probe", {}).get("steer", [])
        entries = rng.choice([[], same, same, steer(rng, len(ids))])
        requests.append(request(len(first) + i, f"b{i}", ids, entries))
    return requests


def steer(rng: random.Random, length: int) -> list[dict[str, Any]]:
    """One to three interventions, few enough kinds that several requests have the same."""
    found = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind: dict[str, Any] = rng.choice(
            [
                {"vector": "up", "strength": 30},
                {"vector": "up", "strength": 4, "unit": "mean_norm"},
                {"vector": "late", "op": "project_out"},
                {"vector": "late", "op": "cap", "strength": 1},
                {"vector": "up", "op": "clamp", "strength": 12},
            ]
        )
        where: dict[str, Any] = rng.choice(
            [
                {},
                {},
                {"phases": ["prefill"]},
                {"phases": ["decode"]},
                {"phases": ["decode"], "generation_window": [rng.randrange(1, 5), rng.choice([None, 6])]},
                {"prompt_window": [rng.choice([-1, -20, 8]), None]},
                {"phases": ["prefill"], "prompt_window": [0, rng.randrange(1, length)]},
                {"exclude": [0, rng.randrange(length)]},
            ]
        )
        found.append({**kind, **where})
    return found


def request(
    index: int,
    rid: str,
    ids: Sequence[int],
    steer: Sequence[Mapping[str, Any]],
    new: int = _NEW,
    *,
    temperature: float = 0.0,
) -> Request:
    """A request of token ids, of a fixed length."""
    params: dict[str, Any] = {"max_new_tokens": new, "temperature": temperature, "ignore_eos": True}
    if steer:
        params["custom_params"] = {"probe": {"steer": [dict(s) for s in steer]}}
    return Request(index, rid, tuple(ids), (SegmentSpan("prompt", 0, len(ids)),), None, params)


def prepared(library: Path | None, concurrency: int, **steer: Any) -> Prepared:
    """A recording of the built-in model in fp32 with the library, or with none, and small chunks."""
    config = Recording.model_validate(
        {
            "dtype": "float32",
            "hook_points": ["hook_embed", *POINTS],
            "server": _SERVER,
            "concurrency": concurrency,
            "steer": None if library is None else {"library": str(library), **steer},
        }
    )
    return prepare(config, workload=Workload((request(0, "none", [1, 2], []),)))


def attack(folder: Path, host: EngineHost, *, seed: int, requests: int) -> Outcome:
    """Serve traffic alone and together, and compare. The library is `folder/library`."""
    rng = random.Random(seed)
    one, many = prepared(folder / "library", 1), prepared(folder / "library", 8)
    off, runs = Arm(cache="off"), folder / "runs"
    first = traffic(rng, requests * 2 // 3)
    alone = record([RunSpec("alone first", first, off)], one, runs, host=host)["alone first"]
    second = turns(rng, first, alone.requests().set_index("rid")["output_ids"])
    second = [r for r in second if len(r.prompt_ids) + _NEW < 250]
    again = record([RunSpec("alone second", second, off)], one, runs, host=host)["alone second"]
    # First turns come first, so that there is something to take, rightly and wrongly.
    everybody = [*first, *second]
    together = record([RunSpec("together", everybody, Arm())], many, runs, host=host)["together"]
    return compare(together, [alone, again])


def compare(together: Run, alone: Sequence[Run]) -> Outcome:
    """Tokens, rows of what was computed together, and the ledger."""
    tokens = together.tokens()
    spans = together.spans()
    reused = spans[spans["status"] == "reused"]
    lengths = (reused["end"] - reused["start"]).where(reused["intervention"].notna(), 0)
    found = Outcome(
        requests=len(together.requests()),
        steered=len(together.interventions()),
        reused=int((reused["end"] - reused["start"]).sum()),
        reused_steered=int(lengths.sum()),
        gates="{} open, {} closed".format(*((together.gates()["opened"] == b).sum() for b in (True, False))),
        retracted=int(together.requests()["retractions"].sum()),
    )
    found.wrong += [f"{c.name}: {c.violation}" for run in (together, *alone) for c in verify(run) if not c.holds]
    for run in alone:
        outputs = together.requests().set_index("rid")["output_ids"]
        theirs = run.tokens()
        for r in run.requests().itertuples():
            mine = tokens[(tokens["rid"] == r.rid) & (tokens["row"] >= 0)].set_index("position")
            other = theirs[(theirs["rid"] == r.rid) & (theirs["row"] >= 0)].set_index("position")
            both = mine.index.intersection(other.index)
            if list(outputs[r.rid]) != list(r.output_ids):
                found.wrong.append(f"{r.rid}: it decodes {list(outputs[r.rid])}, and alone {list(r.output_ids)}")
                both = both[both < r.prompt_len]
            for point in POINTS:
                a = together.rows(point, mine.loc[both, "row"].to_numpy())
                b = run.rows(point, other.loc[both, "row"].to_numpy())
                error = row_distance(a, b)[0]
                found.worst = max(found.worst, float(error.max(initial=0.0)))
                if (error > SAME).any():
                    at = both[int(error.argmax())]
                    found.wrong.append(f"{r.rid} position {at}: {point} is off by {error.max():.1e}")
            found.positions += len(both)
            found.plain_positions += int(pd.isna(mine.loc[both, "intervention"]).sum())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="odd: now and then everything is retracted")
    parser.add_argument("--requests", type=int, default=60, help="first turns and second ones")
    parser.add_argument("--sabotage", default="", help="a safeguard to disable (tests/attack/plugin/sabotages.py)")
    options = parser.parse_args()
    if options.sabotage:
        plugin = Path(__file__).parent / "plugin"
        sys.path.insert(0, str(plugin))  # processes that are started have it too
        os.environ["PROBE_SABOTAGE"] = options.sabotage
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.seed % 2:
            os.environ["SGLANG_TEST_RETRACT"] = "1"  # now and then everything is retracted
        make_library(folder / "library")
        with EngineHost() as host:
            outcome = attack(folder, host, seed=options.seed, requests=options.requests)
    print("STEERED", json.dumps({"seed": options.seed, "sabotage": options.sabotage, **outcome.to_json()}))
    for wrong in outcome.wrong[:20]:
        print(f"  {wrong}")
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
