"""Cases of test_attention_kernel.py, run in Triton's interpreter, which has to be chosen before Triton is imported.

Prints one JSON object for the kernel and each case, and for its counterpart in PyTorch: the largest absolute
differences from `study.attention` and `study.telemetry`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_probe.attention.telemetry import entropy, mass_by_region, top_positions
from sglang_probe.attention.weights import AttentionSpec, attention_weights
from sglang_probe.engine.capture import attention_kernel, attention_reference


@dataclass
class Case:
    name: str
    lengths: list[int]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    sampled: list[int] = field(default_factory=lambda: [0, 3])
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    window: int | None = None
    top_k: int = 5
    equal: bool = False
    loud: float = 1.0


CASES = [
    Case("blocks", [1, 2, 63, 64, 65, 130, 200]),
    Case("all heads share a kv head", [70, 9], heads=6, kv_heads=1, sampled=[0, 1, 2, 3, 4, 5], dim=16),
    Case("a width that is no power of two", [90], dim=80, sampled=[2]),
    Case("bfloat16", [100, 40], dtype=torch.bfloat16),
    Case("softcap", [80, 33], softcap=5.0, loud=4.0),
    Case("sliding window", [150, 20, 64], window=48),
    Case("equal logits: the earlier positions", [130, 7], equal=True, top_k=6),
    Case("sharp attention", [128], loud=40.0),
    Case("fewer keys than top-k", [3], top_k=8),
]


def run(case: Case, by: str, attention_summary: Any) -> dict[str, float | str | bool]:
    generator = torch.Generator().manual_seed(len(case.name))
    b, longest, slots = len(case.lengths), max(case.lengths), sum(case.lengths) + 50
    pool = torch.randn(slots, case.kv_heads, case.dim, generator=generator).to(case.dtype)
    q = (torch.randn(b, case.heads, case.dim, generator=generator) * case.loud).to(case.dtype)
    if case.equal:
        q[:] = pool[:] = 1.0
    pages = torch.randperm(slots, generator=generator)
    table = torch.zeros(b, longest + 3, dtype=torch.int32)
    taken = 0
    for i, length in enumerate(case.lengths):
        table[i, :length] = pages[taken : taken + length]
        table[i, length:] = slots - 1  # what lies behind a row is no key
        taken += length
    # sinks, system, rest of the prompt, generated (nothing in the first request)
    ends = torch.tensor([[4, n // 3, n if i == 0 else n - n // 4, n] for i, n in enumerate(case.lengths)])
    ends = ends.minimum(torch.tensor(case.lengths)[:, None]).cummax(1).values
    first = [max(1, n - n // 4 - i) for i, n in enumerate(case.lengths)]
    got = attention_summary(
        q,
        pool,
        table,
        torch.tensor(case.lengths),
        ends,
        torch.tensor(case.sampled),
        scaling=case.dim**-0.5,
        top_k=case.top_k,
        softcap=case.softcap or 0.0,
        sliding_window=case.window or 0,
        first_B=torch.tensor(first),
        longest=max(first) + 2,
    )
    spec = AttentionSpec(case.dim**-0.5, case.softcap, case.window)
    worst = {"mass": 0.0, "entropy": 0.0, "without_sinks": 0.0, "weights": 0.0, "first": 0.0}
    same_positions = True
    for i, n in enumerate(case.lengths):
        weights_GRNJ = attention_weights(q[i : i + 1], pool[table[i, :n].long()], spec, first=n - 1)
        a = weights_GRNJ.flatten(0, 1)[case.sampled]  # [heads, 1, J]
        region = torch.bucketize(torch.arange(n), ends[i], right=True)
        mass = mass_by_region(a, region, 4)[:, 0]
        worst["mass"] = max(worst["mass"], float((got.mass()[i] - mass).abs().max()))
        reference = entropy(a, n - 1).support.log()[:, 0]
        worst["entropy"] = max(worst["entropy"], float((got.entropy()[i] - reference).abs().max()))
        rest = a[..., int(ends[i, 0]) :]
        if rest.shape[-1] and float(rest.sum(-1).min()) > 1e-6:
            reference = entropy(a, n - 1, sinks=int(ends[i, 0])).support.log()[:, 0]
            difference = got.entropy(without=[0])[i] - reference
            worst["without_sinks"] = max(worst["without_sinks"], float(difference.abs().max()))
        assert torch.isneginf(got.first_logits[i, :, first[i] :]).all()
        whole = a[:, 0, : first[i]]
        if float(whole.sum(-1).min()) > 1e-6:
            difference = torch.softmax(got.first_logits[i, :, : first[i]], -1) - whole / whole.sum(-1, keepdim=True)
            worst["first"] = max(worst["first"], float(difference.abs().max()))
        oldest = max(0, n - case.window) if case.window else 0
        k = min(case.top_k, n - oldest)
        positions, values = top_positions(a[:, 0], k)
        same_positions &= got.top_positions[i, :, :k].tolist() == positions.tolist()
        same_positions &= bool((got.top_positions[i, :, k:] == -1).all())
        worst["weights"] = max(worst["weights"], float((got.top_weights[i, :, :k] - values).abs().max()))
        assert not got.top_weights[i, :, k:].any()
    return {"name": case.name, "by": by, "same_positions": same_positions, **worst}


if __name__ == "__main__":
    for case in CASES:
        for by, function in (("kernel", attention_kernel), ("reference", attention_reference)):
            print(json.dumps(run(case, by, function.attention_summary)), flush=True)
