"""How many tokens the KV pool of a harvest's engine has, where the user left it open.

`engine/platform/defaults.py` gives 65,536, which is 3 GB of a model of 30 layers in float32. A workload that needs less
gets less, and nothing else changes: whatever fitted fits, no request waits or is retracted that was not before, and
nothing that the prefix cache would have kept is evicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_probe.engine.platform.defaults import MAX_TOTAL_TOKENS
from sglang_probe.workload.build import new_tokens
from sglang_probe.workload.request import Request

CHOSEN_BY = ("max_total_tokens", "mem_fraction_static")
"""Server arguments by which a user chooses it."""

_STEP = 1024
"""Pools are a multiple of this, so that alike workloads have the same."""
_MOST_LOOKED_AT = 32 * MAX_TOTAL_TOKENS
"""Prompt tokens that are compared; a workload that has more is taken to need the default."""


def left_open(server: Mapping[str, Any]) -> bool:
    """Whether these server arguments leave the size of the pool to us."""
    return all(server.get(name) is None for name in CHOSEN_BY)


@dataclass(frozen=True)
class Pool:
    """What the arms and tasks of a study have in common, so that they share an engine and are comparable."""

    together: int
    """Requests in flight at once, in the arm with most of them."""
    page_size: int = 1
    least: int = 0
    """Tokens of the pool, for what is known when the study is prepared."""

    def tokens(self, requests: Sequence[Request], *, copies: int = 1, more: int = 0) -> int:
        """Tokens that are enough for every request of a recording at once in the prefix cache, and for those that are
        in flight together on top of it; `least` or more, and at most the default of the platform.

        Args:
            copies: how often each prompt is asked, each time with output of its own.
            more: tokens that a request may have beyond its own.
        """
        new = [_new(r) for r in requests]
        if None in new:
            return MAX_TOTAL_TOKENS  # until the context is full
        # An overlapping step has one slot more in use, and a request ends within a page.
        more += 2 * self.page_size
        outputs = [n + more for n in new if n is not None]
        prompts = [r.prompt_ids for r in requests]
        served = self.together * max((len(p) + n for p, n in zip(prompts, outputs, strict=True)), default=0)
        needed = served + copies * sum(outputs)
        if needed < MAX_TOTAL_TOKENS:
            needed += distinct_tokens(prompts, MAX_TOTAL_TOKENS)
        return min(MAX_TOTAL_TOKENS, max(self.least, -(-(needed + _STEP) // _STEP) * _STEP))


def distinct_tokens(prompts: Iterable[Sequence[int]], most: int) -> int:
    """Nodes of the prefix tree of the prompts: what of them a prefix cache holds once. `most` where it is no less, or
    where there are too many to look at."""
    looked, chosen = 0, []
    for ids in prompts:
        looked += len(ids)
        if looked > _MOST_LOOKED_AT:
            return most
        chosen.append(tuple(ids))
    found = 0
    before: tuple[int, ...] = ()
    for ids in sorted(chosen):
        found += len(ids) - shared_length(before, ids)
        before = ids
        if found >= most:
            return most
    return found


def shared_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens that two prompts begin with alike."""
    end = min(len(a), len(b))
    if a[:end] == b[:end]:
        return end
    same, differ = 0, end  # alike up to the first, not up to the second; slices, because steps of Python are slow
    while differ - same > 1:
        middle = (same + differ) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            differ = middle
    return same


def _new(request: Request) -> int | None:
    """Tokens that a request may generate, over all its samples; None: as many as fit."""
    params = request.sampling_params
    n = new_tokens(params)
    if n == 0 and params.get("max_new_tokens", 0) is None:
        return None
    return n * int(params.get("n") or 1)
