"""How exact are the causes of computed tokens, and how exact is a replay? On real engines, under eviction.

    python bench/replay.py causes [--out runs/replay]    # 1,000 random requests of the attack, and agents in turns
    python bench/replay.py what-if [--requests 10000] [--concurrency 1] [--policy lru] [--out runs/replay]
    python bench/replay.py looks [--seed 41] [--requests 1000] [--out runs/replay]    # what a replay of attacks lacks

`causes` sums the causes of each run and puts them against SGLang's own count of prefill tokens. `what-if` serves
conversations that grow over a pool of 2,048 tokens, replays them on SGLang's own tree with the recorded settings, and
counts the matches that are not the engine's. `looks` also gives the replay every time at which SGLang asked the tree
for a request that waited, and then also every time at which it touched what such a request would get
(`bench/looks/looks.py`); a run has neither. It does so for the hardest attack (seed 2, 100 requests, LFU) and for the
attack with LRU (`--seed`, `--requests`). Prints rows of Markdown tables; runs that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from sglang_probe.harvest.config import Recording
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import prepare
from sglang_probe.harvest.simulate import simulated_tree
from sglang_probe.run import schema
from sglang_probe.run.causes import autopsy
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.what_if.replay import as_recorded
from sglang_probe.studies.what_if.study import what_if
from sglang_probe.verify.verify import verify
from sglang_probe.workload.build import Workload
from sglang_probe.workload.request import Request, SegmentSpan
from tests.attack.plan import TIGHT

ROOT = Path(__file__).parents[1]
ATTACK: dict[str, Any] = {
    "server": {"max_total_tokens": 1536, "chunked_prefill_size": 64, "page_size": 1},
    "concurrency": 8,
    "hook_points": [],
    "cache": "on",
}
HARDEST: dict[str, Any] = {
    "server": TIGHT,
    "env": {"SGLANG_TEST_RETRACT": "1"},
    "cache": "on",
    "bypass": False,
    "priorities": False,
    "pauses": False,
    "refusals": False,
    "samples": False,
    "concurrency": 8,
    "refused": None,
}
"""LFU, which counts every time that it is asked, and retractions every few steps."""
SESSIONS, LONGEST, NEW = 40, 320, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["causes", "what-if", "looks"])
    parser.add_argument("--requests", type=int, help="default: 10,000 of `what-if`, 1,000 of `looks`")
    parser.add_argument("--seed", type=int, default=41, help="of the attack with LRU")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--page", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs") / "replay")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "causes":
        sys.stdout.write(_causes("attack", attacked(args.out / "attack", 41, 1000, ATTACK)))
        sys.stdout.flush()
        sys.stdout.write(_causes("agents", conversations(args.out, 1000, 4, "lru", 1)))
    elif args.what == "looks":
        sys.stdout.write(_with_looks(args.out / "looks", "hardest", 2, 100, HARDEST, "lfu"))
        sys.stdout.flush()
        folder, requests = args.out / f"looks-{args.seed}", args.requests or 1000
        sys.stdout.write(_with_looks(folder, "attack", args.seed, requests, ATTACK, "lru"))
    else:
        run = conversations(args.out, args.requests or 10_000, args.concurrency, args.policy, args.page)
        sys.stdout.write(_replayed(run, args.concurrency, f"{args.policy}, page {args.page}"))


def attacked(folder: Path, seed: int, requests: int, plan: dict[str, Any], looks: Path | None = None) -> Run:
    """Random traffic of the attack: aborts, continuations, log-probabilities, samples, salts."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if looks is not None:
        env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'bench' / 'looks'}", "LOOKS_FILE": str(looks.resolve())}
    if not (folder / "run" / "requests.parquet").exists():
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.attack.driver", "--seed", str(seed), "--requests", str(requests)]
        command += ["--out", str(folder / "run"), "--plan", json.dumps(plan)]
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=sys.stderr)
    return load_run(folder / "run")


def looks_of(path: Path, kinds: Collection[str] = ("asked", "touched")) -> list[tuple[int, str, int]]:
    """Order, rid and limit of each time that the tree was asked for a request, or touched what one would get."""
    told = [line.split(" ") for line in path.read_text().splitlines()]
    return [(int(order), rid, int(limit)) for order, rid, limit, kind in told if kind in kinds]


def _with_looks(folder: Path, name: str, seed: int, requests: int, plan: dict[str, Any], policy: str) -> str:
    """A row for each kind of looks that the replay is given."""
    folder.mkdir(parents=True, exist_ok=True)
    run = attacked(folder, seed, requests, plan, folder / "looks.txt")
    asked = run.requests(interrupted=True)
    asked = asked[asked["prompt_ids"].notna() & (asked["prompt_len"] > 0)]
    tree = run.tree()
    matched = tree[(tree["event"] == schema.MATCHED) & tree["rid"].isin(asked["rid"])]
    evicted = int(tree.loc[tree["event"] == schema.EVICTED, "tokens"].sum())
    lines = []
    for given, kinds in (("nothing", ()), ("asked", ("asked",)), ("asked and touched", ("asked", "touched"))):
        looks = looks_of(folder / "looks.txt", kinds)
        pool = EvictionsCounted(int(plan["server"]["max_total_tokens"]), policy)
        outcome = as_recorded(run, asked, pool.make, looks)
        apart = [
            int(m.end) - outcome.given[m.rid, int(m.attempt)]
            for m in matched.itertuples()
            if (m.rid, int(m.attempt)) in outcome.given
        ]
        differ = sum(d != 0 for d in apart)
        counts = [len(looks), len(apart), differ, sum(apart), evicted, pool.evicted]
        lines.append(f"| {name} | {given} | " + " | ".join(f"{n:,}" for n in counts) + " |\n")
    return "".join(lines)


class EvictionsCounted:
    """Makes trees for a replay, and counts what they evict.

    Args:
        tokens: slots of each tree's pool.
    """

    def __init__(self, tokens: int, policy: str) -> None:
        self.evicted = 0
        self._tokens, self._policy = tokens, policy

    def make(self) -> Any:
        tree: Any = simulated_tree(self._tokens, 1, self._policy)
        evict = tree._tree._evict

        def counted(*args: object, **kwargs: object) -> Any:
            result = evict(*args, **kwargs)
            self.evicted += int(result.num_tokens_evicted)
            return result

        tree._tree._evict = counted
        return tree


def conversations(out: Path, requests: int, concurrency: int, policy: str, page: int) -> Run:
    """Agents whose prompts grow turn by turn, in any order, over a pool that holds about ten of them."""
    config = {
        "hook_points": [],
        "concurrency": concurrency,
        "server": {"max_total_tokens": 2048, "radix_eviction_policy": policy, "page_size": page},
    }
    made = tuple(_turns(requests))
    name = f"turns-{requests}-{concurrency}-{policy}-{page}"
    prepared = prepare(Recording.model_validate(config), workload=Workload(made))
    with EngineHost() as host:
        return record([RunSpec(name, made)], prepared, out / name, host=host, resume=True)[name]


def _turns(requests: int) -> list[Request]:
    rng = random.Random(5)
    rules = [[rng.randrange(10, 3000) for _ in range(60)] for _ in range(4)]
    said: dict[int, list[int]] = {}
    made = []
    for i in range(requests):
        s = min(int(rng.expovariate(0.1)), SESSIONS - 1)
        if s not in said or len(said[s]) > LONGEST:
            said[s] = list(rules[s % 4])
        said[s] = [*said[s], *(rng.randrange(10, 3000) for _ in range(rng.randint(8, 40)))]
        spans = (SegmentSpan("prompt", 0, len(said[s])),)
        params = {"max_new_tokens": NEW, "temperature": 0.0, "ignore_eos": True}
        made.append(Request(i, f"t{i:06d}", tuple(said[s]), spans, f"session-{s}", params))
    return made


def _causes(name: str, run: Run) -> str:
    found = autopsy(run)
    by = found.by_cause()
    spans = run.spans()
    computed = spans[(spans["status"] == "computed") & spans["phase"].isin(["prefill", "recompute"])]
    tokens = int((computed["end"] - computed["start"]).sum())
    engine = int(run.forwards()["prefill_tokens"].sum()) if "prefill_tokens" in run.forwards() else tokens
    held = {c.name: c.holds for c in verify(run)}
    causes = ", ".join(f"{cause} {n:,}" for cause, n in by.items())
    requests = len(run.requests(interrupted=True))
    return (
        f"| {name} | {requests:,} | {tokens:,} | {engine - tokens:+,} | {sum(by.values()) - tokens:+,} | {causes} | "
        f"{'all hold' if all(held.values()) else [n for n, ok in held.items() if not ok]} |\n"
    )


def _replayed(run: Run, concurrency: int, settings: str) -> str:
    found = what_if(run.path, kv_tokens="2x")
    tree = run.tree()
    evicted = int(tree["tokens"].fillna(0).sum())
    apart = (found.requests["recorded"].astype(int) - found.requests["replayed"].astype(int)).to_numpy()
    return (
        f"| {settings}, {concurrency} in flight | {len(found.requests):,} | {evicted:,} | {found.recorded:,} | "
        f"{found.replayed:,} | {found.differ:,} | {int(np.abs(apart).max(initial=0)):,} |\n"
    )


if __name__ == "__main__":
    main()
