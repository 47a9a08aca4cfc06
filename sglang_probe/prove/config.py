"""What `sglang-probe prove` is told."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from sglang_probe.config import Config
from sglang_probe.paths import BUILT_IN_MODEL
from sglang_probe.run.hook_points import ATTENTION, EMBED


class ProofConfig(Config):
    """The configuration of an engine to be proved, and how much traffic proves it."""

    model: str = BUILT_IN_MODEL
    dtype: str = "auto"
    server: dict[str, Any] = Field(default_factory=dict)
    """SGLang server arguments of the engine that is to be proved."""
    hook_points: list[str] = Field(default_factory=list)
    """Empty: `default_points`."""
    seed: int = 1
    requests: int = Field(default=40, ge=8)
    """Of each of two recordings."""
    references: int = Field(default=4, ge=1)
    """Requests that `transformers` computes again."""
    kept_sets: bool = False
    """Kept sets of requests (`evict`) are proved too. On an accelerator that needs `disable_cuda_graph`."""
    rounds: int = Field(default=8, ge=1)
    """Of the measurement of overhead, each of two batches that are recorded and two that are not."""


def default_points(layers: int, tp_size: int = 1) -> list[str]:
    """The embedding, the residual stream early, in the middle and late, and all of attention of one layer.

    Args:
        tp_size: with several ranks each has some heads, and rows of heads are refused.
    """
    middle = layers // 2
    residuals = [f"blocks.{i}.hook_resid_post" for i in sorted({0, middle, layers - 1})]
    heads = [f"blocks.{middle}.{site}" for site in ATTENTION] if tp_size == 1 else []
    return [EMBED, *residuals, *heads]
