"""Eviction methods, one file each. Importing this package registers all of them, in the order of their listing."""

from __future__ import annotations

# The order is that of listings: baselines, prompt scorers, lookahead scorers, wrappers, selection.
# isort: off
from sglang_probe.study.eviction.methods import (
    random,
    protected_random,
    streaming_llm,
    protected_lru,
    knorm,
    keydiff,
    snapkv,
    pyramidkv,
    h2o,
    observed_attention,
    tova,
    expected_attention,
    laq,
    laq_plus_plus,
    dapq,
    speckv,
    adakv,
    criticalkv,
    caote,
    quest,
)
# isort: on

__all__ = [
    "adakv",
    "caote",
    "criticalkv",
    "dapq",
    "expected_attention",
    "h2o",
    "keydiff",
    "knorm",
    "laq",
    "laq_plus_plus",
    "observed_attention",
    "protected_lru",
    "protected_random",
    "pyramidkv",
    "quest",
    "random",
    "snapkv",
    "speckv",
    "streaming_llm",
    "tova",
]
