"""How well does `probe-recall` answer the workload `retrieval`, in transformers and in SGLang?

    python models/probe-recall/evaluate.py [--model models/probe-recall] [--count 96]

Greedy decoding of the very requests that a harvest serves: the later keys of `recall` are forced, every answer is the
model's own, and a wrong answer of `chase` or `copy` is the next question. Writes `accuracy.json` beside the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared, prepare
from sglang_probe.workload.facts import TASKS
from sglang_probe.workload.request import Request

DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]


@torch.no_grad()
def decode(model: LlamaForCausalLM, requests: list[Request]) -> list[list[int]]:
    """Greedy output tokens of prompts of one length, with prescribed tokens where a request has them."""
    tokens = torch.tensor([r.prompt_ids for r in requests])
    forced = [r.sampling_params.get("custom_params", {}).get("probe", {}).get("force") for r in requests]
    outputs: list[list[int]] = [[] for _ in requests]
    cache = None
    for step in range(requests[0].sampling_params["max_new_tokens"]):
        result = model(tokens, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        for i, sampled in enumerate(result.logits[:, -1].argmax(-1).tolist()):
            prescribed = forced[i][step] if forced[i] else None
            outputs[i].append(sampled if prescribed is None else prescribed)
        tokens = torch.tensor([[o[-1]] for o in outputs])
    return outputs


def right_answers(requests: list[Request], outputs: list[list[int]]) -> list[list[bool]]:
    """For each request and answer whether the output holds it."""
    graded = []
    for request, output in zip(requests, outputs, strict=True):
        truth = request.truth
        assert truth is not None
        graded.append([output[s] == a for s, a in zip(truth.answer_steps, truth.answer_ids, strict=True)])
    return graded


def _share(values: list[bool]) -> float:
    return round(sum(values) / len(values), 4)


def _row(prepared: Prepared, where: str, outputs: list[list[int]]) -> dict[str, Any]:
    requests = prepared.workload.requests
    graded = right_answers(requests, outputs)
    depth = {d: [g[0] for i, g in enumerate(graded) if i % len(DEPTHS) == n] for n, d in enumerate(DEPTHS)}
    row = {
        "where": where,
        "task": prepared.workload.source["task"],
        "prompt_tokens": len(requests[0].prompt_ids),
        "requests": len(requests),
        "answers": sum(map(len, graded)),
        "accuracy": _share([right for g in graded for right in g]),
        "first_answer_by_depth": {str(d): _share(found) for d, found in depth.items()},
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--lengths", type=int, nargs="+", default=[120, 228, 276])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(args.model / "checkpoint", dtype=torch.float32).eval()

    rows = []
    with EngineHost() as host, tempfile.TemporaryDirectory() as folder:
        for dtype in ("bfloat16", "float32"):
            for length in args.lengths:
                for task in TASKS:
                    distractors = min(4, length // 30) if task == "copy" else length // 6 - 8
                    workload = {"source": "retrieval", "task": task, "count": args.count, "prompt_tokens": length}
                    prepared = prepare(
                        HarvestConfig.model_validate(
                            {
                                "model": str(args.model / "checkpoint"),
                                "dtype": dtype,
                                "workload": {**workload, "seed": 7, "distractors": distractors, "depth": DEPTHS},
                                "hook_points": [],
                            }
                        )
                    )
                    if dtype == "float32":
                        rows.append(_row(prepared, "transformers float32", decode(model, prepared.workload.requests)))
                    path = Path(folder) / f"{dtype}-{length}-{task}"
                    spec = RunSpec(path.name, prepared.workload.requests)
                    run = record([spec], prepared, path.parent, host=host, asks={"force"})[path.name]
                    served = run.requests().sort_values("index")
                    rows.append(_row(prepared, f"sglang {dtype}", [o.tolist() for o in served["output_ids"]]))
    (args.model / "accuracy.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
