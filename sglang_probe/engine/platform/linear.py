"""Linear layers and output head of a bf16 model on a CPU without bf16 instructions (`sglang_probe/bf16.py`).

SGLang asks a layer's `quant_method` for its product, and the output head's if it is not one of its unquantized ones
(`logits_processor.py`, `should_apply_lm_head_quant_method`). Other products of bf16 matrices stay PyTorch's: those of
mixtures of experts and of vision towers.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from torch import Tensor

from sglang_probe import bf16


class WideLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """A linear layer multiplied in fp32."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return bf16.linear(x, layer.weight, bias)

    def apply_into(self, layer: Any, x: Tensor, output: Tensor, bias: Tensor | None = None) -> Tensor:
        return output.copy_(bf16.linear(x, layer.weight, bias))


class WideEmbeddingMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """An embedding, which may be the output head as well, whose logits are multiplied in fp32."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # SGLang passes a bias here which its unquantized head does not add.
        return bf16.linear(x.to(layer.weight.dtype), layer.weight)


_WIDE: dict[type, type] = {
    UnquantizedLinearMethod: WideLinearMethod,
    UnquantizedEmbeddingMethod: WideEmbeddingMethod,
}


def widen(model: torch.nn.Module) -> int:
    """Let the layers of a loaded model multiply as `bf16.products` says. Returns how many were changed."""
    if bf16.products() == "bf16":
        return 0
    # `enable_fp32_lm_head` asks for logits that are not rounded to bf16: SGLang multiplies in fp32 by itself then.
    wide_head = any(getattr(m, "use_fp32_lm_head", False) for m in model.modules())
    changed = 0
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        weight = getattr(module, "weight", None)
        if type(method) not in _WIDE or weight is None or weight.dtype != torch.bfloat16:
            continue
        if type(method) is UnquantizedEmbeddingMethod and wide_head:
            continue
        module.quant_method = _WIDE[type(method)]()
        changed += 1
    return changed
