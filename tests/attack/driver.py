"""Random traffic against a real engine with the probe: `python -m tests.attack.driver --seed 7 --out DIR`.

Everything follows from the seed (`tests/attack/plan.py`). Which requests an abort hits, and what a continued request
had answered, depends on timing; the invariants must hold whatever happens. The seed is printed first, so that a failure
can be replayed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_probe.errors import UnsupportedError
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.engine import server_argument_choices, server_argument_names
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.job import job_of
from sglang_probe.harvest.prepare import prepare
from sglang_probe.harvest.recording import harvest
from sglang_probe.policy.arm import Arm
from sglang_probe.prove.clients import Clients
from sglang_probe.prove.traffic import make_traffic
from sglang_probe.workload.build import Workload
from tests.attack.plan import plan_of
from tests.attack.windowed import renewed_prefixes

_PLACEHOLDER = {"source": "shared_prefix", "families": 1, "requests_per_family": 1, "exemplars": 0}
"""A workload that fits into any KV pool; the requests are replaced."""


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
            **({} if plan.model is None else {"model": plan.model}),
            "concurrency": plan.concurrency,
            "server": plan.server,
            "hook_points": plan.hook_points,
            "simulated_graphs": plan.simulated_graphs,
        }
    )
    try:
        prepared = prepare(config, {"arm": config.arm})
    except UnsupportedError as e:
        print("REFUSED", json.dumps(e.message), flush=True)
        return
    traffic = renewed_prefixes(plan.seed, plan.requests, plan.vocabulary) if plan.renewed else make_traffic(plan)
    requests = [t.request for t in traffic]
    prepared = replace(prepared, workload=Workload(tuple(requests)))
    clients = Clients(plan, traffic, requests)
    job = job_of(prepared, args.out.name, requests, arm=Arm(cache=plan.cache))
    # The list itself: requests that continue others are made while it is served.
    job = replace(job, requests=requests, slot_truth=args.out.resolve().parent / "slots")
    with EngineHost() as host:
        asks = frozenset({"cache"} if plan.bypass else ())
        _name_samples()
        run = harvest(job, args.out, host, overwrite=True, asks=asks, serving=clients.serve)
    spans = run.spans()
    counts = {
        "finish": run.requests()["finish_reason"].value_counts().to_dict(),
        "phases": (spans["end"] - spans["start"]).groupby(spans["phase"]).sum().to_dict(),
        "reused": int((spans["end"] - spans["start"])[spans["status"] == "reused"].sum()),
        "rebinds": len(run.rebinds()),
        "retracted": int((run.engine_requests()["retractions"] > 0).sum()),
        **clients.counts,
        "mixed": int((run.forwards()["mode"] == "mixed").sum()),
    }
    print("DONE", json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
