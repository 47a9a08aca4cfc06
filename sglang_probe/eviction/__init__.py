"""The eviction lab, offline: which positions a method would keep, and what decoding would lose by it.

    layer = Layer(q_NHD=..., k_LGD=..., spec=AttentionSpec(scaling=d**-0.5), future=Queries(...))
    selection = parse_method({"method": "snapkv", "window": 8}).select(layer, budget=64)
    metrics.nontrivial_mass_recall(layer.future_attention, selection.keep_TGL, trivial)

`METHODS` and `ORACLES` list what there is.
"""

from __future__ import annotations

from sglang_probe.eviction import methods, oracles
from sglang_probe.eviction.base import Method, Oracle, Policy, Selection
from sglang_probe.eviction.from_run import kept_sets, layer_from_run, lookahead_from_run
from sglang_probe.eviction.layer import Layer, Queries, stack
from sglang_probe.eviction.protocol import Protocol, under
from sglang_probe.eviction.registry import METHODS, ORACLES, parse_method, parse_oracle

__all__ = [
    "METHODS",
    "ORACLES",
    "Layer",
    "Method",
    "Oracle",
    "Policy",
    "Protocol",
    "Queries",
    "Selection",
    "kept_sets",
    "layer_from_run",
    "lookahead_from_run",
    "methods",
    "oracles",
    "parse_method",
    "parse_oracle",
    "stack",
    "under",
]
