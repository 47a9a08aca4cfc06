"""What the bare products and the bare attention of a model do on this machine, without an engine: which row counts give
a row other bits."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sglang_probe import bf16

PRODUCTS = "products.json"
DRAWS = 16
"""Random inputs of each kernel: what differs in the last bits of float32 seldom survives the rounding to bfloat16."""
_LARGEST = 1 << 25
"""Inputs times outputs times draws of a product: the output head of a large vocabulary is multiplied once."""
ATTENTION = "attention (queries of one request)"


def products_json(model: Mapping[str, Any], dtype: str, row_counts: Sequence[int], prefix: int) -> str:
    """The table of `row_classes` for every product of a layer and the output head, that of `attention_classes`, and the
    machine, as JSON.

    Args:
        model: the model's `config.json`.
        dtype: of the rows, e.g. `float32`.
        prefix: positions before the counted queries of attention.
    """
    counts = sorted(set(row_counts))
    rows: list[dict[str, Any]] = []

    def add(product: str, n_in: int, n_out: int, classes: Sequence[int]) -> None:
        told = {"product": product, "inputs": n_in, "outputs": n_out}
        rows.extend({**told, "rows": m, "class": c} for m, c in zip(counts, classes, strict=True))

    for product, (n_in, n_out) in shapes(model).items():
        add(product, n_in, n_out, row_classes(n_in, n_out, getattr(torch, dtype), counts))
    heads, kv_heads, width = head_shape(model)
    attention = attention_classes(heads, kv_heads, width, getattr(torch, dtype), counts, prefix)
    add(ATTENTION, heads * width, heads * width, attention)
    return json.dumps({"machine": machine(), "dtype": dtype, "products": rows}, indent=1) + "\n"


def read_products(folder: Path) -> tuple[dict[str, str], pd.DataFrame]:
    """Machine and table that `products_json` wrote; empty if there is no such file."""
    columns = ["product", "inputs", "outputs", "rows", "class"]
    if not (folder / PRODUCTS).exists():
        return {}, pd.DataFrame(columns=columns)
    found = json.loads((folder / PRODUCTS).read_text(encoding="utf-8"))
    return found["machine"], pd.DataFrame(found["products"], columns=columns)


def shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the products of a Llama-like layer, fused as SGLang fuses them, and of the output head."""
    hidden = int(model["hidden_size"])
    heads, kv_heads, width = head_shape(model)
    return {
        "qkv": (hidden, (heads + 2 * kv_heads) * width),
        "attention output": (heads * width, hidden),
        "gate and up": (hidden, 2 * int(model["intermediate_size"])),
        "down": (int(model["intermediate_size"]), hidden),
        "head": (hidden, int(model["vocab_size"])),
    }


def head_shape(model: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, kv heads and the width of a head."""
    heads = int(model["num_attention_heads"])
    return (
        heads,
        int(model.get("num_key_value_heads") or heads),
        int(model.get("head_dim") or int(model["hidden_size"]) // heads),
    )


def row_classes(
    n_in: int,
    n_out: int,
    dtype: torch.dtype,
    row_counts: Sequence[int],
    *,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
) -> list[int]:
    """For each row count a number; equal numbers mean that the first row of `x @ w.T` has equal bits.

    Args:
        n_in, n_out: width of `x` and of the result; `x` and `w` are filled with normal numbers.
        row_counts: rows of `x`.
        multiply: of `x` and `w`; by default the engine's product on a CPU: PyTorch's, or `sglang_probe.bf16.linear`
            where bf16 is widened.
    """
    draw = torch.Generator().manual_seed(seed)
    w_OI = (torch.randn((n_out, n_in), generator=draw) / n_in**0.5).to(dtype)
    draws = min(DRAWS, max(1, _LARGEST // (n_in * n_out)))
    x_RMI = torch.randn((draws, max(row_counts), n_in), generator=draw).to(dtype)
    if multiply is None:
        widened = dtype == torch.bfloat16 and bf16.products() == "fp32"
        multiply = bf16.linear if widened else torch.nn.functional.linear
    return _classes(torch.stack([multiply(x_MI[:m], w_OI)[0] for x_MI in x_RMI]) for m in row_counts)


def attention_classes(
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    row_counts: Sequence[int],
    prefix: int,
    *,
    seed: int = 0,
) -> list[int]:
    """As `row_classes`, of PyTorch's `scaled_dot_product_attention`: the first of `m` queries after `prefix` positions,
    each of which sees the positions up to its own."""
    draw = torch.Generator().manual_seed(seed)
    longest = prefix + max(row_counts)
    q_RHMD = torch.randn((DRAWS, 1, heads, max(row_counts), width), generator=draw).to(dtype)
    k_RKLD, v_RKLD = (torch.randn((DRAWS, 1, kv_heads, longest, width), generator=draw).to(dtype) for _ in range(2))

    def first(m: int) -> torch.Tensor:
        visible = torch.ones((m, prefix + m), dtype=torch.bool).tril(prefix)
        found = []
        for q, k, v in zip(q_RHMD, k_RKLD, v_RKLD, strict=True):  # one at a time: a batch is cut up in other ways
            q, k, v = q[:, :, :m], k[:, :, : prefix + m], v[:, :, : prefix + m]
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
            found.append(out[0, :, 0])
        return torch.stack(found)

    return _classes(first(m) for m in row_counts)


def _classes(rows: Iterable[torch.Tensor]) -> list[int]:
    """Numbers of the distinct tensors, by their bits."""
    seen: dict[bytes, int] = {}
    return [seen.setdefault(r.contiguous().view(torch.uint8).numpy().tobytes(), len(seen)) for r in rows]


def cpu_name() -> str:
    """The processor as Linux names it; elsewhere as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine() -> dict[str, str]:
    """CPU, the instructions that PyTorch uses, its version and its threads."""
    return {
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "bf16 products": bf16.products(),
    }
