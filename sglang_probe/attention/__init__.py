"""Attention from captured queries and keys: weights, rotations, telemetry definitions. On tensors; no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_probe.lazy import lazily

if TYPE_CHECKING:
    from sglang_probe.attention.rope import Rotary
    from sglang_probe.attention.run_telemetry import captured_layers, step_telemetry, write_telemetry
    from sglang_probe.attention.weights import (
        AttentionSpec,
        attention_blocks,
        attention_logits,
        attention_received,
        attention_weights,
    )

__all__ = [
    "AttentionSpec",
    "Rotary",
    "attention_blocks",
    "attention_logits",
    "attention_received",
    "attention_weights",
    "captured_layers",
    "step_telemetry",
    "write_telemetry",
]

__getattr__ = lazily(
    __name__,
    {
        "AttentionSpec": "weights",
        "Rotary": "rope",
        "attention_blocks": "weights",
        "attention_logits": "weights",
        "attention_received": "weights",
        "attention_weights": "weights",
        "captured_layers": "run_telemetry",
        "step_telemetry": "run_telemetry",
        "write_telemetry": "run_telemetry",
    },
)
