"""Server arguments that a user of the CPU reference platform would otherwise have to know, in one place.

A harvest passes them (`harvest/engine.py`), and the platform sets them for a server that is started without them
(`apply_server_args_defaults`), so that both compute alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_probe.engine.releases import release

SGLANG_WATCHDOG_SECONDS = 300
"""SGLang's own `watchdog_timeout`: after so long without a finished forward pass it ends the engine."""

WATCHDOG_SECONDS = 3600
"""Ours, at least. A forward pass of 8,192 tokens of a model of 0.6 billion parameters is 10 TFLOP: a quarter of an hour
at 12 GFLOP/s, and four times that where other work has three quarters of the machine. A hang is rare on a CPU, which
has no collective operations to wait for; a slow forward is not."""

_CHUNK = 8192
"""Tokens of a forward, where nobody chose `chunked_prefill_size`."""

_SLOWER = 20
"""How much longer a forward may take than the products with its weights alone: for attention, and for other work on the
machine. Better a hang that is noticed late than a slow forward that is ended."""

MAX_TOTAL_TOKENS = 65536
"""Of the KV pool. A harvest that needs less takes less (`harvest/pool.py`)."""


def cpu_defaults(given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Server arguments for the CPU reference platform, beyond those that are given (and not None)."""
    has = {name for name, value in (given or {}).items() if value is not None}
    defaults: dict[str, Any] = {"watchdog_timeout": WATCHDOG_SECONDS}
    if not has & {"attention_backend", "prefill_attention_backend", "decode_attention_backend"}:
        defaults["attention_backend"] = release().cpu_attention[0]
    # The pool is sized from free memory otherwise, which on a shared CPU machine is neither small nor repeatable; and
    # SGLang would derive a negative fraction from large prefills.
    if "mem_fraction_static" not in has:
        defaults["mem_fraction_static"] = 0.5
        defaults["max_total_tokens"] = MAX_TOTAL_TOKENS
    return {name: value for name, value in defaults.items() if name not in has}


def watchdog_seconds(model: Path, server: Mapping[str, Any]) -> int:
    """How long SGLang's watchdog should wait for a forward pass of a model on this machine as it is now: `_SLOWER`
    times what the products with its weights take by a product timed here, and `WATCHDOG_SECONDS` at least.

    Args:
        model: folder with its safetensors; two bytes are counted a parameter.
        server: its server arguments.
    """
    parameters = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2
    operations = 2 * parameters * (server.get("chunked_prefill_size") or _CHUNK)
    return max(WATCHDOG_SECONDS, math.ceil(_SLOWER * operations / _operations_per_second()))


def _operations_per_second() -> float:
    """Of a product of float32 matrices on as many threads as PyTorch has here; the best of three."""
    import torch

    x, w = torch.ones(256, 1024), torch.ones(1024, 1024)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        x @ w
        seconds.append(time.perf_counter() - began)
    return float(2 * x.numel() * len(w) / min(seconds))


_NAMES = (
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "mem_fraction_static",
    "max_total_tokens",
    "watchdog_timeout",
)


def apply_cpu_defaults(server_args: Any) -> None:
    """Set what the user left open. A watchdog of SGLang's own 300 s counts as left open: it cannot be told apart."""
    given = {name: getattr(server_args, name, None) for name in _NAMES}
    if given["watchdog_timeout"] == SGLANG_WATCHDOG_SECONDS:
        given["watchdog_timeout"] = None
    if given["attention_backend"] == "intel_amx":  # what SGLang chooses for every CPU, and falls back from later
        given["attention_backend"] = None
    for name, value in cpu_defaults(given).items():
        setattr(server_args, name, value)
