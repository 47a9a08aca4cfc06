"""Generating from a compressed cache in the real engine: requests that each name a kept set.

A request with a kept set of `n` positions computes its first `n` positions as always; every later query attends, in its
layer and kv head, to the kept ones of them and to all positions behind them. Nothing is freed: the entries stay in the
pool and are left out of the attention, so memory and its effects on scheduling are those of a full cache. Such a request
reads the radix cache up to position `n` and publishes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.ledger.run import Run


@dataclass(frozen=True)
class EvictedRequest:
    """One request of an eviction run."""

    rid: str
    prompt_ids: Sequence[int]
    key: str | None = None
    """Its kept set in the file; None: full cache."""
    force: Sequence[int] | None = None
    """Output tokens to decode in place of sampled ones; generation stops behind them."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Over the recording's own sampling parameters."""
    publishes: bool = False
    """Whether a request without a kept set leaves its entries in the radix cache for those behind it."""
    family: str | None = None


def run_evicted(
    prepared: Prepared,
    path: Path,
    requests: Sequence[EvictedRequest],
    *,
    kept: Path | None = None,
    host: EngineHost | None = None,
    overwrite: bool = False,
) -> Run:
    """Serve `requests`, in order, and record the run directory `path`.

    Model, dtype, hook points, default sampling, server arguments and concurrency are those of `prepared.config`; its
    workload is not served. The kept sets in use are copied to `path`.

    Raises:
        ConfigError: a key is not in `kept`, or its set does not fit the request or the model.
        ProbeError: as `sglang_probe.harvest.session.harvest`.
    """
    raise NotImplementedError
