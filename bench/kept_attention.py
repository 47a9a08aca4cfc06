"""Attention of decode steps alone, without an engine: our backend beside SGLang's `torch_native`, in one process.

    python bench/kept_attention.py [--rounds 5]

Both attend to the same pool of 4 layers for 32 requests, 64 steps a round; the modes take turns within a round, and
ratios are taken within it. `bench/eviction.py` measures the same in an engine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from eviction import BUDGETS, CONCURRENT, KV_HEADS, LAYERS, NONE, PROMPTS, STOCK, kept_set
from page import machine

from sglang_probe.engine.hooks import guard
from sglang_probe.engine.platform import kept_rows
from sglang_probe.engine.platform.environment import prepare_this_process
from sglang_probe.engine.platform.kept_rows import KeptRow

HEADS, DIM, POOL, STEPS = 8, 32, 65536, 64


def run_round(dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of one decode step, all layers, by mode."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from sglang_probe.engine.platform.attention import ProbeTorchBackend

    table = torch.zeros(CONCURRENT, 1024, dtype=torch.int32)
    free = torch.arange(POOL).int()
    for i, n in enumerate(PROMPTS):
        table[i, : n + STEPS], free = free[: n + STEPS], free[n + STEPS :]
    pools = [[torch.randn(POOL, KV_HEADS, DIM).to(dtype) for _ in range(2)] for _ in range(LAYERS)]
    runner = SimpleNamespace(
        device="cpu", dtype=dtype, req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=None
    )
    query, requests = torch.randn(CONCURRENT, HEADS, DIM).to(dtype), torch.arange(CONCURRENT)
    mode = SimpleNamespace(is_decode=lambda: True)
    options = {"scaling": DIM**-0.5, "enable_gqa": True, "causal": False, "is_cross_attn": False}
    milliseconds = {}
    for name in (STOCK, NONE, *BUDGETS):
        backend: Any = (TorchNativeAttnBackend if name == STOCK else ProbeTorchBackend)(runner)
        sets = [kept_set(n, BUDGETS[name], "uneven" in name) for n in PROMPTS] if name in BUDGETS else []
        seconds = 0.0
        for step in range(STEPS):
            ends = torch.tensor(PROMPTS) + step + 1
            rows = [KeptRow(i, str(i), 0, k, k.length + step, k.length + step + 1) for i, k in enumerate(sets)]
            guard.session = SimpleNamespace(recorder=object(), fail=_fail)  # type: ignore[assignment]
            kept_rows.at_hand = rows
            batch = SimpleNamespace(out_cache_loc=None, seq_lens=ends, req_pool_indices=requests, forward_mode=mode)
            began = time.perf_counter()
            backend.init_forward_metadata(batch)
            for layer, (k, v) in enumerate(pools):
                backend._layer = layer
                out = torch.empty_like(query)
                backend._run_sdpa_forward_decode(
                    query, out, k, v, table, requests, ends, None, **options, sliding_window_size=None
                )
            seconds += time.perf_counter() - began
        milliseconds[name] = 1000 * seconds / STEPS
    return milliseconds


def _fail(where: str, error: BaseException) -> None:
    raise RuntimeError(where) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    prepare_this_process()
    torch.set_num_threads(1)
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; {args.rounds} rounds\n")
    print(
        "| attention | bfloat16 ms a step | speed over stock (range) | float32 ms a step | speed over stock (range) |"
    )
    print("|---|---|---|---|---|")
    rounds = {d: [run_round(d) for _ in range(args.rounds)] for d in (torch.bfloat16, torch.float32)}
    for name in (STOCK, NONE, *BUDGETS):
        cells = [name]
        for found in rounds.values():
            ratios = [r[STOCK] / r[name] for r in found]
            cells.append(f"{statistics.median(r[name] for r in found):.1f}")
            cells.append(f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
