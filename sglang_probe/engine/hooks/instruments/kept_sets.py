"""Requests that attend to a kept set: what they ask for, whether it can be had, and which rows of a forward are theirs.

A request says `custom_params: {probe: {evict: key}}`. Behind its first `n` positions its entries are computed from a
compressed cache and are no other request's to reuse, so it publishes nothing; nor may it reuse those that another
request computed from a full cache, so its match ends at `n`. SGLang: as in `engine/hooks/policy.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from sglang_probe.engine.hooks import session as probe
from sglang_probe.engine.ledger.recorder import ForwardPlan
from sglang_probe.engine.platform.limits import PROBE_TORCH
from sglang_probe.errors import ProbeError, UnsupportedError
from sglang_probe.kept_set import Kept, KeptFile

_UNPACKED = 1024
"""Kept sets held unpacked: more than a batch has requests."""


@dataclass(frozen=True)
class EvictedRow:
    """A request of a forward pass that computes positions `[start, end)`, some of them behind its cache."""

    row: int
    """In the batch."""
    rid: str
    attempt: int
    kept: Kept
    start: int
    end: int


class Evictions:
    """The kept sets of a recording, as the engine uses them.

    Raises (on construction):
        ProbeError: the file cannot be read. UnsupportedError: a set is for another model.
    """

    def __init__(self, file: KeptFile, *, layers: int, kv_heads: int) -> None:
        for key, shape in file.shapes.items():
            if shape[1:3] != (layers, kv_heads):
                raise UnsupportedError(
                    f"the kept set `{key}` is for {shape[1]} layers of {shape[2]} kv heads; the model has {layers} "
                    f"of {kv_heads}"
                )
        self.lengths = {key: shape[-1] for key, shape in file.shapes.items()}
        self.kept = functools.lru_cache(_UNPACKED)(file.__getitem__)

    def refusal(self, key: object, prompt_len: int) -> str | None:
        """Why a request cannot have this kept set."""
        if not isinstance(key, str) or key not in self.lengths:
            return f"`evict: {key}` is no kept set of this recording"
        if self.lengths[key] > prompt_len:
            return f"the kept set `{key}` is for {self.lengths[key]} positions and the prompt has {prompt_len}"
        return None


def open_evictions(scheduler: Any, path: Any) -> Evictions | None:
    """The kept sets that a recording names, if it names any.

    Raises:
        ProbeError: as `Evictions`. UnsupportedError: the engine does not attend as a kept set needs.
    """
    if path is None:
        return None
    server, model = scheduler.server_args, scheduler.model_config
    backends = {getattr(server, f"{phase}attention_backend") for phase in ("", "prefill_", "decode_")} - {None}
    if backends != {PROBE_TORCH}:
        raise UnsupportedError(
            f"kept sets need the attention backend `{PROBE_TORCH}`; this engine has {sorted(backends)}",
            fix=f"set `server: {{attention_backend: {PROBE_TORCH}}}` on a machine without an accelerator",
        )
    if server.tp_size != 1:
        raise UnsupportedError("under tensor parallelism each rank has a share of the kv heads", fix="set `tp_size: 1`")
    return Evictions(KeptFile(path), layers=model.num_hidden_layers, kv_heads=model.get_num_kv_heads(1))


def requested(req: Any) -> object | None:
    """The key that a request names."""
    params = req.sampling_params.custom_params
    options = params.get("probe") if isinstance(params, dict) else None
    return options.get("evict") if isinstance(options, dict) else None


def cache_end(req: Any) -> int | None:
    """First position that a request must compute itself; None if it has no kept set."""
    key = requested(req)
    if key is None:
        return None
    evictions = probe.active().evictions
    if evictions is None or evictions.refusal(key, len(req.origin_input_ids)):
        return None
    return evictions.lengths[str(key)]


def refuse_misfits(req: Any) -> None:
    """Have SGLang refuse a request that names a kept set which it cannot have: it then answers with the reason."""
    key = requested(req)
    if key is None:
        return
    evictions = probe.active().evictions
    if evictions is None:
        reason: str | None = f"`evict: {key}` is no kept set of this recording, which has none"
    else:
        reason = evictions.refusal(key, len(req.origin_input_ids))
    if reason:
        req.set_finish_with_abort(f"sglang-probe: {reason}")


def rows_of(evictions: Evictions, reqs: list[Any], plan: ForwardPlan) -> list[EvictedRow]:
    """Rows of a forward with queries behind their cache.

    Raises:
        ProbeError: a request that was admitted under a kept set cannot have it.
    """
    found = []
    for i, req in enumerate(reqs):
        key = requested(req)
        if key is None:
            continue
        if reason := evictions.refusal(key, plan.prompt_lens[i]):
            if req.to_finish is not None:  # refused at its arrival: one token runs in the place of its prompt
                continue
            raise ProbeError(f"request {req.rid}: {reason}")
        if plan.ends[i] > evictions.lengths[str(key)]:
            kept = evictions.kept(str(key))
            found.append(EvictedRow(i, req.rid, plan.attempts[i], kept, plan.starts[i], plan.ends[i]))
    return found
