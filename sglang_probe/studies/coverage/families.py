"""Which requests belong together: the clusters over which intervals are taken.

Requests that share a prefix are not independent: what one computes, the others reuse. A workload names its prefix
families. Where it does not (live traffic), they are taken from the lineage: a request that reused at least half of its
prompt belongs to the family of the request from which it reused most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_probe.run.columns import Requests, Traffic
from sglang_probe.studies.coverage.reuse import REUSED

Array = np.ndarray[Any, Any]

GROUPS = 512
"""More families than this are put together at random in this many groups, which are as independent as families are."""


@dataclass(frozen=True)
class Families:
    """Family and group of each request."""

    group: Array
    """int64 [R], below `groups`."""
    groups: int
    count: int
    source: str
    """Where the families come from, in words."""


def find_families(requests: Requests, traffic: Traffic, *, seed: int) -> Families:
    """Families as named by the workload, or else by lineage; each request without one is a family of its own."""
    count = len(requests)
    named = requests.family >= 0
    if named.all() and count:
        family, source = requests.family.astype(np.int64), "prefix families named by the workload"
    else:
        root = _roots(requests, traffic)
        source = "prefix families by lineage: who reused half of its prompt joins the request it reused most from"
        if named.any():
            source = "prefix families named by the workload, and by lineage where it names none"
        family = np.where(named, requests.family.astype(np.int64), count + root)
    _, family = np.unique(family, return_inverse=True)
    families = int(family.max()) + 1 if count else 0
    if families <= GROUPS:
        return Families(family, families, families, source)
    drawn = np.random.default_rng(seed).permutation(families) % GROUPS
    return Families(drawn[family], GROUPS, families, source)


def _roots(requests: Requests, traffic: Traffic) -> Array:
    """For each request the request that its family begins with."""
    count = len(requests)
    spans = traffic.spans
    reused = spans.where((spans.fate == REUSED) & (spans.origin >= 0) & (spans.origin < count))
    reused = reused.where(reused.origin != reused.request)
    pair, inverse = np.unique(reused.request.astype(np.int64) << 32 | reused.origin, return_inverse=True)
    positions = np.bincount(inverse, weights=reused.end - reused.start, minlength=len(pair))
    request, origin = pair >> 32, pair & 0xFFFFFFFF
    total = np.bincount(request, weights=positions, minlength=count)
    parent = np.arange(count)
    order = np.argsort(positions, kind="stable")  # the largest is written last
    enough = 2 * total[request] >= np.maximum(requests.prompt_len[request], 1)
    order = order[enough[order]]
    parent[request[order]] = origin[order]
    # Smallest number of each connected component. Two requests may each have reused from the other, so following the
    # parents might never end.
    root = np.arange(count)
    while True:
        smaller = np.minimum(root, root[parent])
        np.minimum.at(smaller, parent, smaller.copy())
        if np.array_equal(smaller, root):
            return root
        root = smaller
