"""Random traffic against a real engine with the probe: `python -m tests.attack.driver --seed 7 --out DIR`.

Everything follows from the seed (`tests/attack/plan.py`). Which requests an abort hits, and what a continued request
had answered, depends on timing; the invariants must hold whatever happens. The seed is printed first, so that a failure
can be replayed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from sglang_probe.errors import UnsupportedError
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.engine import Answer, ProbedEngine, server_argument_choices, server_argument_names
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.job import job_of
from sglang_probe.harvest.prepare import prepare
from sglang_probe.harvest.recording import harvest
from sglang_probe.harvest.requests_table import workload_columns
from sglang_probe.policy.arm import Arm
from sglang_probe.run.workload_digest import digest_of_columns
from sglang_probe.workload.build import Workload
from sglang_probe.workload.request import Request, SegmentSpan
from tests.amended import amend
from tests.attack.plan import LONGEST, Plan, Traffic, make_traffic, plan_of

_PLACEHOLDER = {"source": "shared_prefix", "families": 1, "requests_per_family": 1, "exemplars": 0}
"""A workload that fits into any KV pool; the requests are replaced."""


class Attack:
    """Takes the place of `ProbedEngine.serve`: the same requests in waves, with aborts and pauses inside, and flushes
    between."""

    def __init__(self, plan: Plan, traffic: list[Traffic], requests: list[Request]) -> None:
        self.plan = plan
        self.traffic = traffic
        self.requests = requests
        self.rng = random.Random(plan.seed + 2)
        self.answers: dict[int, Answer] = {}
        self.counts = dict.fromkeys(
            ("served", "aborted", "left", "refused", "flushed", "paused", "continued", "samples"), 0
        )

    async def serve(self, engine: ProbedEngine, concurrency: int) -> AsyncIterator[Answer]:
        self.manager = engine._engine.tokenizer_manager
        _name_samples()
        rest = list(self.traffic)
        while rest:
            size = self.rng.randint(8, 40)
            wave, rest = rest[:size], rest[size:]
            gate = asyncio.Semaphore(concurrency)
            disturbing = asyncio.ensure_future(self._disturb())
            for answers in await asyncio.gather(*(self._one(gate, t) for t in wave)):
                for answer in answers:
                    yield answer
            await disturbing
            if self.rng.random() < 0.25:
                self.counts["flushed"] += bool((await self.manager.flush_cache()).success)
        await self.manager.flush_cache(timeout_s=30)  # waits for requests whose clients have gone away

    async def _disturb(self) -> None:
        """Pause and go on, or abort everything, in the middle of a wave."""
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

        if self.plan.pauses:
            await asyncio.sleep(self.rng.random() * 0.5)
            await self.manager.pause_generation(PauseGenerationReqInput(mode=self.rng.choice(["retract", "in_place"])))
            await asyncio.sleep(0.05)
            await self.manager.continue_generation(ContinueGenerationReqInput())
            self.counts["paused"] += 1
        if self.rng.random() < 0.1:
            await asyncio.sleep(self.rng.random() * 0.5)
            self.manager.abort_request(abort_all=True)

    async def _one(self, gate: asyncio.Semaphore, traffic: Traffic) -> list[Answer]:
        async with gate:
            request = self._continued(traffic)
            self.requests[request.index] = request
            timer = None
            if traffic.abort_after is not None:
                timer = asyncio.get_running_loop().call_later(traffic.abort_after, self._abort, request.rid)
            try:
                generated = await self._ask(request, traffic)
            except (ValueError, HTTPException):  # how SGLang answers an abort, a full queue, and what it refuses
                self.counts["refused"] += 1
                return []
            finally:
                if timer is not None:
                    timer.cancel()
        answers = [
            Answer(g["meta_info"]["id"], list(g["output_ids"]), int(g["meta_info"]["cached_tokens"]))
            for g in generated
            if (g["meta_info"]["finish_reason"] or {}).get("type") not in (None, "abort")
        ]
        if answers:
            self.answers[request.index] = answers[0]
            self.counts["served"] += 1
            self.counts["samples"] += len(answers) - 1
        return answers

    def _continued(self, traffic: Traffic) -> Request:
        """The request, continuing an earlier one if that has been answered and leaves room."""
        ours = traffic.request
        earlier = self.answers.get(traffic.follows) if traffic.follows is not None else None
        if earlier is None or traffic.follows is None:
            return ours
        said = (*self.requests[traffic.follows].prompt_ids, *earlier.output_ids)
        prompt = (*said, *ours.prompt_ids[-traffic.tail :]) if traffic.tail else said
        if len(prompt) > LONGEST:
            return ours
        self.counts["continued"] += 1
        return replace(ours, prompt_ids=prompt, spans=(SegmentSpan("prompt", 0, len(prompt)),))

    async def _ask(self, request: Request, traffic: Traffic) -> list[dict[str, Any]]:
        """Send it and read the answer, one for each sample; none if the client went away."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        options = dict(traffic.options)
        stream = options.pop("stream", False) or traffic.reads is not None
        asked = GenerateReqInput(
            input_ids=list(request.prompt_ids),
            sampling_params=dict(request.sampling_params),
            rid=request.rid,
            stream=stream,
            **options,
        )
        last: dict[str, dict[str, Any]] = {}
        pieces = 0
        answer = self.manager.generate_request(asked, None)
        async for said in answer:
            last |= {s["meta_info"]["id"]: s for s in (said if isinstance(said, list) else [said])}
            pieces += 1
            if pieces == traffic.reads and not all(s["meta_info"]["finish_reason"] for s in last.values()):
                self.counts["left"] += 1
                self._abort(request.rid)  # as SGLang's HTTP server does when a client disconnects
                await answer.aclose()
                return []
        return list(last.values())

    def _abort(self, rid: str) -> None:
        self.counts["aborted"] += 1
        for known in [r for r in self.manager.rid_to_state if r.startswith(rid)]:  # its samples have names of their own
            self.manager.abort_request(rid=known)


def _name_samples() -> None:
    """Name the warm-up and the samples of a request with `n` after it, as `<rid>~<number>`.

    SGLang gives them random names in this process, so that the ledger could not be told what they were asked.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    numbers = itertools.count(1)

    def regenerate_rid(self: Any, **_prefix: Any) -> str:
        self.rid = f"{self.rid.partition('_')[0]}~{next(numbers)}"
        return str(self.rid)

    GenerateReqInput.regenerate_rid = regenerate_rid


def _known(server: dict[str, Any]) -> dict[str, Any]:
    """What the installed release of SGLang has; of other draws it keeps its defaults."""
    names, choices = server_argument_names(), server_argument_choices()
    known = {k: v for k, v in server.items() if k in names}
    return {k: v for k, v in known.items() if v is None or k not in choices or v in choices[k]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", type=json.loads, default={}, help="JSON: fields of `Plan` over the drawn ones")
    args = parser.parse_args()
    plan = replace(plan_of(args.seed, args.requests), **args.plan)
    plan = replace(plan, server=_known(plan.server))
    print("ATTACK", json.dumps({"seed": plan.seed, "options": plan.options, "refused": plan.refused}), flush=True)
    os.environ.update(plan.env)

    config = HarvestConfig.model_validate(
        {
            "workload": _PLACEHOLDER,
            "concurrency": plan.concurrency,
            "server": plan.server,
            "hook_points": plan.hook_points,
            "accelerator": plan.accelerator,
        }
    )
    try:
        prepared = prepare(config, {"arm": config.arm})
    except UnsupportedError as e:
        print("REFUSED", json.dumps(e.message), flush=True)
        return
    traffic = make_traffic(plan)
    requests = [t.request for t in traffic]
    prepared = replace(prepared, workload=Workload(tuple(requests)))
    attack = Attack(plan, traffic, requests)

    async def serve(engine: ProbedEngine, _todo: list[Any], concurrency: int) -> AsyncIterator[Answer]:
        async for answer in attack.serve(engine, concurrency):
            yield answer

    ProbedEngine.serve = serve  # type: ignore[method-assign]
    job = job_of(prepared, args.out.name, requests, arm=Arm(cache=plan.cache))
    job = replace(job, requests=requests)  # the list itself: requests that continue others are made while it is served
    with EngineHost() as host:
        asks = frozenset({"cache"} if plan.bypass else ())
        run = harvest(job, args.out, host, overwrite=True, asks=asks)
    made = digest_of_columns(workload_columns(r) for r in requests)  # some of them after the manifest was
    amend(args.out, lambda manifest: manifest.update(columns_digest=made))
    spans = run.spans()
    counts = {
        "finish": run.requests()["finish_reason"].value_counts().to_dict(),
        "phases": (spans["end"] - spans["start"]).groupby(spans["phase"]).sum().to_dict(),
        "reused": int((spans["end"] - spans["start"])[spans["status"] == "reused"].sum()),
        "rebinds": len(run.rebinds()),
        "retracted": int((run.engine_requests()["retractions"] > 0).sum()),
        **attack.counts,
        "mixed": int((run.forwards()["mode"] == "mixed").sum()),
    }
    print("DONE", json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
