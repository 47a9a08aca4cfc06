"""Generating from a compressed cache in the real engine: requests that each name a kept set.

A request with a kept set of `n` positions computes its first `n` positions as always; every later query attends, in
its layer and kv head, to the kept ones of them and to all positions behind them. With `n` the length of the prompt the
first output token therefore still comes from the full cache, as in the papers. Nothing is freed: the entries stay in
the pool and are left out of the attention, so memory and scheduling are those of a full cache. Such a request reads the
radix cache up to position `n` and publishes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_probe.engine.hooks import inventory
from sglang_probe.errors import ConfigError
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared, check_sampling
from sglang_probe.harvest.progress import Reporter
from sglang_probe.harvest.recording import Hooks, harvest
from sglang_probe.kept_set import KeptFile
from sglang_probe.policy.arm import Arm
from sglang_probe.run.run import Run
from sglang_probe.workload.build import Workload, check_fits
from sglang_probe.workload.request import Request, SegmentSpan


@dataclass(frozen=True)
class EvictedRequest:
    """One request of an eviction run."""

    rid: str
    prompt_ids: Sequence[int]
    key: str | None = None
    """Its kept set in the file; None: full cache."""
    force: Sequence[int | None] | None = None
    """Output tokens to decode in place of sampled ones, a None is sampled; generation ends with them, end of text or
    not."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Over the recording's own sampling parameters."""
    publishes: bool = True
    """Whether a request without a kept set leaves its entries in the radix cache for those behind it."""
    family: str | None = None


def run_evicted(
    prepared: Prepared,
    path: Path,
    requests: Sequence[EvictedRequest],
    *,
    kept: Path | KeptFile | None = None,
    host: EngineHost | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Serve `requests`, in order, and record the run directory `path`.

    Model, dtype, hook points, default sampling, server arguments and concurrency are those of `prepared.config`; its
    workload is not served. The kept sets in use are copied to `path`. The radix cache is empty at the start; requests
    with one prompt share its prefill if one of them without a kept set comes first.

    Args:
        kept: may be None where no request names a kept set.
        host: shared with other recordings of the same hook points and server arguments; all of them must be made here.

    Raises:
        ConfigError: a key is not in `kept`, its set does not fit the request or the model, or a rid is not usable.
        WorkloadError: a request does not fit into the context.
        ProbeError: as `sglang_probe.harvest.recording.harvest`.
    """
    inventory.require(["bypass", "eviction"])
    file = KeptFile(kept) if isinstance(kept, Path) else kept
    ours = copy.copy(prepared)
    ours.workload_source = {"source": "requests"}
    served = [_request(i, r, prepared.config.sampling) for i, r in enumerate(requests)]
    if len({r.rid for r in served}) < len(served) or any("~" in r.rid for r in served):
        raise ConfigError("request ids of an eviction run must differ and hold no `~`")
    check_sampling(served)
    for r in served:
        check_fits(len(r.prompt_ids), r.sampling_params, prepared.room)
    ours.workload = Workload(served, skipped=0, corpus_digest=None)
    hooks = Hooks(forced_outputs=True, bypass=True, evictions=True)
    return harvest(
        ours, path, Arm(), arm_name=path.name, overwrite=overwrite, reporter=reporter, host=host, hooks=hooks, kept=file
    )


def _request(index: int, given: EvictedRequest, default: dict[str, Any]) -> Request:
    params = {**default, **given.sampling}
    probe: dict[str, Any] = {}
    if given.key is not None:
        probe["evict"] = given.key
    if given.key is not None or not given.publishes:
        probe["cache"] = "read_only"
    if given.force is not None:
        probe["force"] = [None if t is None else int(t) for t in given.force]
        params |= {"max_new_tokens": len(given.force), "ignore_eos": True}
    if probe:
        params["custom_params"] = {**(params.get("custom_params") or {}), "probe": probe}
    prompt = tuple(int(t) for t in given.prompt_ids)
    return Request(index, given.rid, prompt, (SegmentSpan("prompt", 0, len(prompt)),), given.family, params)
