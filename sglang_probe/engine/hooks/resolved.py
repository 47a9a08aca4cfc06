"""Server arguments as they are in force, read from what SGLang has built, for the manifest of every recording.

`ServerArgs` keeps what was given; much is decided later: by the platform, the model and the memory that is free. Only
what decides rows, reuse and batches is named here, never all of them: among the others are the server's keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sglang_probe.engine.releases import release

ARGUMENTS = (
    "model_path",
    "revision",
    "served_model_name",
    "load_format",
    "quantization",
    "context_length",
    "device",
    "sampling_backend",
    "grammar_backend",
    "disable_overlap_schedule",
    "radix_eviction_policy",
    "schedule_conservativeness",
    "enable_deterministic_inference",
    "disable_cuda_graph",
    "num_continuous_decode_steps",
    "tp_size",
    "dp_size",
)
"""Taken from SGLang's resolved arguments where the release has them; the rest is read from its objects."""

_NONE = {"quantization": "none", "revision": "default", "served_model_name": "model_path", "grammar_backend": "none"}
"""What None means."""


def resolved(scheduler: Any, server_args: Any) -> dict[str, Any]:
    """What is in force in this scheduler process, as plain data. Called once the scheduler is built."""
    from sglang.srt.runtime_context import get_schedule

    runner = scheduler.tp_worker.model_runner
    given = release().arguments_in_force(server_args)
    prefill, decode = runner.prefill_attention_backend_str, runner.decode_attention_backend_str
    chunk = scheduler.chunked_prefill_size
    return {
        **{name: _NONE.get(name) if (v := given[name]) is None else v for name in ARGUMENTS if name in given},
        "dtype": _dtype(runner.dtype),
        "kv_cache_dtype": _dtype(runner.kv_cache_dtype),
        "context_length": int(scheduler.model_config.context_len),
        "attention_backend": decode if prefill == decode else f"{prefill} (prefill), {decode} (decode)",
        "attention_class": type(runner.attn_backend).__name__,
        "page_size": int(scheduler.page_size),
        "chunked_prefill_size": -1 if chunk is None else int(chunk),
        "enable_mixed_chunk": bool(get_schedule().enable_mixed_chunk) and chunk is not None,
        "disable_radix_cache": bool(scheduler.tree_cache.disable),
        "schedule_policy": scheduler.policy.policy.value,
        "max_total_tokens": int(scheduler.max_total_num_tokens),
        "max_running_requests": int(scheduler.max_running_requests),
        "max_prefill_tokens": int(scheduler.max_prefill_tokens),
        "random_seed": int(scheduler.random_seed),
        "torch_threads": torch.get_num_threads(),
        "weight_version": release().weight_version(server_args),
        **_device(runner.device),
    }


def _device(device: str) -> dict[str, Any]:
    """What computes, where it is an accelerator."""
    if device != "cuda":
        return {}
    driver = Path("/proc/driver/nvidia/version")
    words = driver.read_text(encoding="utf-8").split() if driver.exists() else []
    number = next((w for w in words if w[:1].isdigit() and "." in w), None)
    from sglang.srt.runtime_context import get_exec

    graphs = get_exec().graph.cuda_graph_config
    return {
        "cuda_graphs": {"decode": str(graphs.decode.backend), "prefill": str(graphs.prefill.backend)},
        "device_name": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": torch.version.cuda,
        "driver": number,
    }


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
