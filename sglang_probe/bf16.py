"""Products of bf16 matrices on a CPU without instructions for them.

There PyTorch multiplies bf16 an order of magnitude slower than fp32. So the factors are widened, which is exact,
multiplied in fp32, and the result is rounded once to bf16: what bf16 hardware does, up to the order of the sums. No
wide copy of a weight is kept, which could grow stale when weights are updated; widening costs what reading costs
(docs/how-to/any-machine.md has the measurements).
"""

from __future__ import annotations

import functools
import os
import threading
from typing import TYPE_CHECKING, Any, Literal

from sglang_probe.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

VARIABLE = "SGLANG_PROBE_BF16_PRODUCTS"
"""`auto` (by what the CPU can do), `bf16` (PyTorch's own) or `fp32` (widened)."""

_scratch = threading.local()


def products() -> Literal["bf16", "fp32"]:
    """In which type this process multiplies bf16 matrices on the CPU.

    Raises:
        ConfigError: `SGLANG_PROBE_BF16_PRODUCTS` is none of `auto`, `bf16` and `fp32`.
    """
    chosen = os.environ.get(VARIABLE) or "auto"
    match chosen:
        case "bf16" | "fp32":
            return chosen
        case "auto":
            return "bf16" if _has_kernels() else "fp32"
    raise ConfigError(f"{VARIABLE}={chosen} is not known", fix="set it to auto, bf16 or fp32, or not at all")


@functools.cache
def _has_kernels() -> bool:
    """Whether oneDNN multiplies bf16 here: from AVX-512 on it does, and then not slower than fp32.

    oneDNN is asked, and not the CPU, because `ONEDNN_MAX_CPU_ISA` can keep it from using what the CPU has.
    """
    import torch

    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(asked is not None and asked())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of bf16 tensors in fp32, rounded to bf16; of a single row as PyTorch does it.

    Args:
        x: `[..., n]`.
        weight: `[m, n]`.
        bias: `[m]`.
    """
    from torch.nn.functional import linear as multiply

    if bias is None and x.numel() == x.shape[-1]:
        return multiply(x, weight)  # PyTorch has a fast kernel for one row on every CPU
    wide = _room(weight.numel()).view(weight.shape).copy_(weight.detach())
    return multiply(x.float(), wide, None if bias is None else bias.float()).to(x.dtype)


def _room(numbers: int) -> Tensor:
    """fp32 memory of this thread, used again for every weight: fresh pages would cost more than widening does."""
    import torch

    room: Tensor | None = getattr(_scratch, "room", None)
    if room is None or room.numel() < numbers:
        with torch.inference_mode(False):
            room = _scratch.room = torch.empty(numbers, dtype=torch.float32)
    return room[:numbers]


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`, of bf16 tensors as `products` says."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if q.dtype != torch.bfloat16 or products() == "bf16":
        return scaled_dot_product_attention(q, k, v, **options)
    if (mask := options.get("attn_mask")) is not None and mask.is_floating_point():
        options["attn_mask"] = mask.float()
    return scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)


def widen(model: nn.Module) -> None:
    """Let the `nn.Linear` layers of a bf16 model on the CPU multiply as `products` says."""
    import torch

    if products() == "bf16":
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.dtype == torch.bfloat16:
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)
