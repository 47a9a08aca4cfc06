"""Random traffic against a real engine with the probe: `python -m tests.attack.driver --seed 7 --out DIR`.

Everything follows from the seed: engine options, tree-shaped prefixes, lengths, stops, salts, duplicates, prompts that
are cached whole, log probabilities of the prompt, aborts at random moments, flushes. Which requests an abort hits
depends on timing; the invariants must hold whatever happens. The seed is printed first, so that a failure can be
replayed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_probe.harvest import session
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.engine import Answer, ProbedEngine
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.policy.arm import Arm
from sglang_probe.workload.build import Workload
from sglang_probe.workload.request import Request, SegmentSpan

VOCABULARY = 3072
_PLACEHOLDER = {"source": "shared_prefix", "families": 1, "requests_per_family": 1, "exemplars": 0}
"""A workload that fits into any KV pool; the requests are replaced."""


@dataclass
class Plan:
    """What one seed means."""

    seed: int
    requests: int
    server: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    concurrency: int = 8


def plan_of(seed: int, requests: int) -> Plan:
    """Draw engine options. Tight memory makes the engine evict and retract."""
    rng = random.Random(seed)
    page = rng.choice([1, 1, 16])
    server: dict[str, Any] = {
        "page_size": page,
        "chunked_prefill_size": rng.choice([32, 64, 128, 4096]),
        "max_total_tokens": rng.choice([1024, 1536, 2560, 8192]),
        "disable_overlap_schedule": rng.random() < 0.3,
        "enable_mixed_chunk": rng.random() < 0.4,
        "radix_eviction_policy": rng.choice(["lru", "lru", "lfu"]),
        "schedule_policy": rng.choice(["fcfs", "lpm", "random"]),
        "schedule_conservativeness": rng.choice([0.1, 0.3, 1.0]),
    }
    env = {"SGLANG_TEST_RETRACT": "1"} if rng.random() < 0.3 else {}
    return Plan(seed, requests, server, env, rng.choice([4, 8, 16]))


def make_requests(plan: Plan) -> list[Request]:
    """Prompts as paths through a random tree of token runs."""
    rng = random.Random(plan.seed + 1)

    def run_of(low: int, high: int) -> list[int]:
        return [rng.randrange(10, VOCABULARY) for _ in range(rng.randint(low, high))]

    tree: list[list[int]] = [run_of(5, 90)]
    for _ in range(12):
        tree.append(rng.choice(tree) + run_of(3, 60))
    requests: list[Request] = []
    for i in range(plan.requests):
        kind = rng.random()
        if kind < 0.15 and requests:
            prompt = list(rng.choice(requests[-4:]).prompt_ids)  # a duplicate, likely in the same batch
        elif kind < 0.25:
            prompt = list(rng.choice(tree)) or [11]  # wholly inside the tree: cached to the last token but one
        else:
            prompt = rng.choice(tree) + run_of(1, 80)
        params: dict[str, Any] = {"max_new_tokens": rng.choice([1, 2, 8, 24, 60]), "temperature": 1.0}
        if rng.random() < 0.5:
            params["stop_token_ids"] = rng.sample(range(VOCABULARY), 300)
        else:
            params["ignore_eos"] = True
        spans = (SegmentSpan("prompt", 0, len(prompt)),)
        requests.append(Request(i, f"r{i:06d}", tuple(prompt), spans, None, params))
    return requests


class Attack:
    """Takes the place of `ProbedEngine.serve`: the same requests in waves, with aborts inside and flushes between."""

    def __init__(self, plan: Plan) -> None:
        self.rng = random.Random(plan.seed + 2)
        self.aborted = 0
        self.flushed = 0

    async def serve(self, engine: ProbedEngine, todo: list[Any], concurrency: int) -> AsyncIterator[Answer]:
        rest = list(todo)
        while rest:
            size = self.rng.randint(8, 40)
            wave, rest = rest[:size], rest[size:]
            gate = asyncio.Semaphore(concurrency)
            for answer in await asyncio.gather(*(self._one(engine, gate, *item) for item in wave)):
                if answer is not None:
                    yield answer
            if self.rng.random() < 0.2:
                await engine._engine.tokenizer_manager.flush_cache()
                self.flushed += 1

    async def _one(
        self, engine: ProbedEngine, gate: asyncio.Semaphore, rid: str, prompt: list[int], params: dict[str, Any]
    ) -> Answer | None:
        options: dict[str, Any] = {}
        kind = self.rng.random()
        if kind < 0.15:
            options["cache_salt"] = self.rng.choice("xyz")
        elif kind < 0.3:
            options |= {"return_logprob": True, "logprob_start_len": self.rng.randrange(len(prompt))}
        abort_after = self.rng.random() * 0.3 if self.rng.random() < 0.15 else None
        async with gate:
            timer = None
            if abort_after is not None:
                timer = asyncio.get_running_loop().call_later(abort_after, self._abort, engine, rid)
            try:
                generated = await engine._engine.async_generate(
                    input_ids=list(prompt), sampling_params=params, rid=rid, stream=False, **options
                )
            except ValueError:  # the engine answers an abort, and a request that cannot fit, with an error
                return None
            finally:
                if timer is not None:
                    timer.cancel()
        if generated["meta_info"]["finish_reason"]["type"] == "abort":
            return None
        return Answer(rid, list(generated["output_ids"]), int(generated["meta_info"]["cached_tokens"]))

    def _abort(self, engine: ProbedEngine, rid: str) -> None:
        self.aborted += 1
        engine._engine.tokenizer_manager.abort_request(rid=rid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--server", type=json.loads, default={}, help="JSON: engine options over the drawn ones")
    args = parser.parse_args()
    plan = plan_of(args.seed, args.requests)
    plan.server.update(args.server)
    print("ATTACK", json.dumps({"seed": plan.seed, "server": plan.server, "env": plan.env}), flush=True)
    os.environ.update(plan.env)

    config = HarvestConfig.model_validate(
        {"workload": _PLACEHOLDER, "concurrency": plan.concurrency, "server": plan.server}
    )
    prepared = Prepared(config, {"arm": config.arm})
    prepared.workload = Workload(make_requests(plan), 0, None)
    attack = Attack(plan)

    async def serve(engine: ProbedEngine, todo: list[Any], concurrency: int) -> AsyncIterator[Answer]:
        async for answer in attack.serve(engine, todo, concurrency):
            yield answer

    ProbedEngine.serve = serve  # type: ignore[method-assign]
    run = session.harvest(prepared, args.out, Arm(), overwrite=True)
    spans = run.spans()
    counts = {
        "finish": run.requests()["finish_reason"].value_counts().to_dict(),
        "phases": (spans["end"] - spans["start"]).groupby(spans["phase"]).sum().to_dict(),
        "reused": int((spans["end"] - spans["start"])[spans["status"] == "reused"].sum()),
        "rebinds": len(run.rebinds()),
        "retracted": int((run.engine_requests()["retractions"] > 0).sum()),
        "aborted": attack.aborted,
        "flushed": attack.flushed,
        "mixed": int((run.forwards()["mode"] == "mixed").sum()),
    }
    print("DONE", json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
