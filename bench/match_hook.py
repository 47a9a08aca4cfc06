"""What it costs to note when the tree was asked for a request: SGLang's own match with the hook after it and without.

    python bench/match_hook.py [--rounds 200]

SGLang's own radix tree without an engine, prompts of several lengths that are cached. Each round asks with the hook and
without it, in a random order; printed is the median of the rounds' ratios, with their middle half. The share of a
forward pass is far smaller: a match is one of many things that a step does.
"""

from __future__ import annotations

import argparse
import random
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from page import middle_half

from sglang_probe.engine.hooks import guard, tree
from sglang_probe.engine.ledger.tree_events import TreeEvents
from sglang_probe.harvest.simulate import simulated_tree
from sglang_probe.report import markdown

CALLS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    events = TreeEvents(0)
    guard.session = SimpleNamespace(recorder=SimpleNamespace(asked=events.asked))  # type: ignore[assignment]
    rows = []
    for length in (64, 512, 4096):
        cache = simulated_tree(20_000, 1, "lru")
        ids = list(range(length + 1))
        slots = cache.take(length)
        cache.insert(ids[:length], slots, 0, 0, length, None)
        ratios, bare, hooked = _rounds(cache, ids, length, rounds)
        told = [f"{length:,}", f"{1e6 * np.median(bare):.1f}", f"{1e6 * np.median(hooked):.1f}"]
        rows.append([*told, middle_half(ratios)])
    print(markdown.table(["cached tokens", "match, us", "match and hook, us", "ratio (middle half)"], rows))


def _rounds(cache: Any, ids: list[int], length: int, rounds: int) -> tuple[list[float], list[float], list[float]]:
    req = SimpleNamespace(origin_input_ids=ids, output_ids=[])
    off = SimpleNamespace(disable=False)
    rng = random.Random(0)
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for hook in rng.sample([False, True], 2):
            began = time.perf_counter()
            for _ in range(CALLS):
                result = cache.match(ids, length, None)
                if hook:
                    tree.match(result, req, off)
            found[hook].append((time.perf_counter() - began) / CALLS)
    ratios = [b / a for a, b in zip(found[False], found[True], strict=True)]
    return ratios, found[False], found[True]


if __name__ == "__main__":
    main()
