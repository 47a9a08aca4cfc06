"""Generating from a compressed cache in the real engine: requests that each name a kept set.

A request with a kept set of `n` positions computes its first `n` positions as always; every later query attends, in
its layer and kv head, to the kept ones of them and to all positions after them. With `n` the length of the prompt the
first output token therefore still comes from the full cache, as in the papers. Nothing is freed: the entries stay in
the pool and are left out of the attention, so memory and scheduling are those of a full cache. Such a request reads the
radix cache up to position `n` and publishes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_probe.ask import Ask
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.progress import Reporter
from sglang_probe.kept_set import KeptFile
from sglang_probe.run.run import Run
from sglang_probe.workload.request import Request, SegmentSpan

ASKS = frozenset({"force", "cache", "evict"})
"""Fields of `Ask` that an engine must honour to serve them."""


@dataclass(frozen=True)
class KeptRequest:
    """One request that is served from a kept set, or beside those that are."""

    rid: str
    prompt_ids: Sequence[int]
    key: str | None = None
    """Its kept set in the file; None: full cache."""
    force: Sequence[int | None] | None = None
    """Output tokens to decode in place of sampled ones, a None is sampled; generation ends with them, end of text or
    not."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Over the recording's own sampling parameters."""
    publishes: bool = True
    """Whether a request without a kept set leaves its entries in the radix cache for those after it."""
    family: str | None = None


def record_kept(
    prepared: Prepared,
    path: Path,
    requests: Sequence[KeptRequest],
    *,
    kept: Path | KeptFile | None = None,
    host: EngineHost | None = None,
    overwrite: bool = False,
    resume: bool = False,
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
        ProbeError: as `sglang_probe.harvest.experiment.record`.
    """
    served = requests_of(requests, prepared.config.sampling)
    again: Any = {"overwrite": overwrite, "resume": resume, "reporter": reporter, "host": host}
    return record([RunSpec(path.name, served, kept=kept)], prepared, path.parent, asks=ASKS, **again)[path.name]


def requests_of(given: Sequence[KeptRequest], sampling: Mapping[str, Any]) -> tuple[Request, ...]:
    """As requests of a `RunSpec`.

    Args:
        sampling: the recording's own sampling parameters.
    """
    return tuple(_request(i, r, sampling) for i, r in enumerate(given))


def _request(index: int, given: KeptRequest, default: Mapping[str, Any]) -> Request:
    params = {**default, **given.sampling}
    ask = Ask(
        evict=given.key,
        cache="read_only" if given.key is not None or not given.publishes else None,
        force=None if given.force is None else tuple(None if t is None else int(t) for t in given.force),
    )
    if given.force is not None:
        params |= {"max_new_tokens": len(given.force), "ignore_eos": True}
    prompt = tuple(int(t) for t in given.prompt_ids)
    return Request(index, given.rid, prompt, (SegmentSpan("prompt", 0, len(prompt)),), given.family, ask.into(params))
