"""Oracles: bounds that read the future. They are registered apart from methods and never listed among them."""

from __future__ import annotations

from sglang_probe.eviction.oracles import causal_refreshed, need_set, per_step, static_max, static_mean

__all__ = ["causal_refreshed", "need_set", "per_step", "static_max", "static_mean"]
