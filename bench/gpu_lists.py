"""Telemetry of one layer by our Triton kernel and by lists of FlashInfer's decode: the milliseconds and errors of each.

Without SGLang, in seconds, on a GPU with FlashInfer. 32 requests of 4,096 keys, 32 query heads over 8 kv heads of 64,
in bf16, every head measured; rounds of the two in turn. `--rehearse` runs the script on a CPU, with a model of the
decode and PyTorch operations for the kernel; its milliseconds mean nothing.

    python bench/gpu_lists.py lists.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_probe.engine.capture.attention_reference import attention_summary as reference
from sglang_probe.engine.capture.paged_decode import decodes_on
from sglang_probe.engine.capture.slot_lists import RegionDecode, RegionLists


def measure(*, rehearse: bool, rounds: int) -> dict[str, Any]:
    """Milliseconds of a layer, its launches included, and the largest errors."""
    device, dtype = torch.device("cpu" if rehearse else "cuda"), torch.bfloat16
    b, n, heads, kv_heads, dim = (2, 256, 4, 2, 64) if rehearse else (32, 4096, 32, 8, 64)
    if rehearse:
        kernel: Callable[..., Any] = reference
    else:
        from sglang_probe.engine.capture.attention_kernel import attention_summary as kernel
    torch.manual_seed(0)
    q = torch.randn(b, heads, dim, dtype=dtype, device=device)
    pool = torch.randn(b * n, kv_heads, dim, dtype=dtype, device=device)
    slots = torch.randperm(b * n, device=device).view(b, n).int()
    ends = np.tile([4, n // 8, n - n // 16, n], (b, 1))
    ends_BR, lengths = torch.tensor(ends, device=device), torch.full((b,), n, device=device)
    every, scaling = torch.arange(heads, device=device), dim**-0.5
    shape: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "dtype": dtype, "device": device}
    tried = RegionDecode.tried(decodes_on(device, dtype, heads // kv_heads), **shape)

    def by_kernel() -> Any:
        return kernel(q, pool, slots, lengths, ends_BR, every, scaling=scaling, top_k=8)

    def laid_out() -> RegionLists:
        lists = RegionLists(slots, ends)
        lists.summary(tried.decodes, q, pool, scaling=scaling, base=tried.base)
        return lists

    planned = laid_out()

    def by_lists() -> Any:
        return planned.summary(tried.decodes, q, pool, scaling=scaling, base=tried.base)

    def milliseconds(ask: Callable[[], Any]) -> float:
        began = time.perf_counter()
        ask()
        if not rehearse:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began)

    ways: dict[str, Callable[[], Any]] = {
        "kernel": by_kernel,
        "lists": by_lists,
        "lists, with the layout and the plan of a forward": laid_out,
    }
    for ask in ways.values():
        milliseconds(ask)  # compiled now
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, ask in ways.items():
            took[name].append(milliseconds(ask))
    true = reference(q[:1], pool, slots[:1], lengths[:1], ends_BR[:1], every, scaling=scaling, top_k=8)
    found = {name: ways[name]() for name in ("kernel", "lists")}
    return {
        "device": "none: a rehearsal on a CPU" if rehearse else torch.cuda.get_device_name(),
        "milliseconds": {name: statistics.median(x) for name, x in took.items()},
        "largest error of a weight": {k: _off(x.mass()[:1], true.mass()) for k, x in found.items()},
        "largest error of an entropy": {k: _off(x.entropy()[:1], true.entropy()) for k, x in found.items()},
    }


def _off(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rehearse", action="store_true", help="test this script on a CPU")
    args = parser.parse_args()
    if not (args.rehearse or torch.cuda.is_available()):
        parser.exit(2, "there is no GPU here; `--rehearse` tests the script\n")
    found = measure(rehearse=args.rehearse, rounds=args.rounds)
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
