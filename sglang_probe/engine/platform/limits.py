"""What the CPU reference platform cannot do, said before an engine is started for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_probe.engine.releases import release
from sglang_probe.errors import UnsupportedError

PROBE_TORCH = "probe_torch"
"""Name of the attention backend in `sglang_probe.engine.platform.attention`."""

_ATTENTION = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")

_RANKS = ("tp_size", "dp_size")

_WITHOUT_GPU: dict[str, tuple[tuple[object, ...], str]] = {
    # server argument: (values that are fine, why no other is)
    "enable_deterministic_inference": ((None, False), "SGLang's batch-invariant operators are GPU kernels"),
    "kv_cache_dtype": ((None, "auto", "bfloat16"), "8-bit KV caches need GPU kernels"),
    "quantization": ((None,), "quantized layers need GPU kernels"),
    "device": ((None, "cpu"), "no accelerator is present"),
}


def refuse_without_gpu(server: Mapping[str, Any]) -> None:
    """Refuse server arguments that need a GPU.

    Raises:
        UnsupportedError: names the argument and why.
    """
    backends = release().cpu_attention
    why = f"the reference platform has PyTorch's attention only ({', '.join(backends)})"
    attention = dict.fromkeys(_ATTENTION, ((None, *backends), why))
    ranks: dict[str, tuple[tuple[object, ...], str]] = {}
    if not release().cpu_ranks:
        ranks = dict.fromkeys(_RANKS, ((None, 1), f"SGLang {release().version} starts one rank without an accelerator"))
    for name, (fine, why) in {**_WITHOUT_GPU, **attention, **ranks}.items():
        if name in server and server[name] not in fine:
            raise UnsupportedError(f"`{name}: {server[name]}` cannot run on this machine: {why}")
