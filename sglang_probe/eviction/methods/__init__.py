"""Eviction methods, one file each, and `kept_sets`: what one of them keeps of the prompts of a run.

Importing this package registers all of them, in the order of their listing.
"""

from __future__ import annotations

# The order is that of listings: baselines, prompt scorers, lookahead scorers, wrappers, selection.
# isort: off
from sglang_probe.eviction.methods import random
from sglang_probe.eviction.methods import protected_random
from sglang_probe.eviction.methods import streaming_llm
from sglang_probe.eviction.methods import protected_lru
from sglang_probe.eviction.methods import knorm
from sglang_probe.eviction.methods import keydiff
from sglang_probe.eviction.methods import snapkv
from sglang_probe.eviction.methods import pyramidkv
from sglang_probe.eviction.methods import h2o
from sglang_probe.eviction.methods import observed_attention
from sglang_probe.eviction.methods import tova
from sglang_probe.eviction.methods import expected_attention
from sglang_probe.eviction.methods import laq
from sglang_probe.eviction.methods import laq_plus_plus
from sglang_probe.eviction.methods import dapq
from sglang_probe.eviction.methods import speckv
from sglang_probe.eviction.methods import adakv
from sglang_probe.eviction.methods import criticalkv
from sglang_probe.eviction.methods import caote
from sglang_probe.eviction.methods import quest

# isort: on
from sglang_probe.eviction.from_run import kept_sets

__all__ = [
    "adakv",
    "caote",
    "criticalkv",
    "dapq",
    "expected_attention",
    "h2o",
    "kept_sets",
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
