"""`requests.parquet`: the workload joined with what the engine recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sglang_probe.ask import recorded
from sglang_probe.kept_set import KeptFile
from sglang_probe.run import journal, schema
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.run import Run
from sglang_probe.workload.request import Request, asked_rid


def write_requests(
    run: Run,
    requests: Sequence[Request],
    kept: KeptFile | None = None,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, int]:
    """Join the workload with what the engine recorded, as `requests.parquet`.

    Args:
        kept: the sets that requests of the workload name.
        refused: requests that were refused, and why. One that never came to the scheduler has no position: its prompt
            is empty in this table, as it is in the ledger.

    Returns the number of requests by finish reason.
    """
    ended = {r["rid"]: r for r in run.engine_requests().to_dict("records")}
    seen = set(run.spans()["rid"])
    by_rid = {r.rid: r for r in requests}
    # One that was in flight when an engine ended has spans under its own name already.
    unseen = {f"{r}~{schema.REFUSED}" if r in seen else r for r in refused.keys() - {asked_rid(rid) for rid in ended}}
    records = []
    for rid in sorted(seen | set(ended) | unseen):
        request = by_rid.get(asked_rid(rid))
        if request is None:  # not of the workload: the engine's own warm-up
            continue
        end = ended.get(rid)
        asked = workload_columns(request)
        reason = end["finish_reason"] if end else schema.INTERRUPTED
        if reason == schema.REFUSED:  # what was served is not what was asked
            asked["prompt_ids"] = [schema.REFUSED_TOKEN]
            asked["segments"] = [{"name": schema.REFUSED, "start": 0, "end": 1}]
        elif rid in unseen:
            reason, asked["prompt_ids"], asked["segments"] = schema.REFUSED, [], []
        records.append(
            {
                "rid": rid,
                "prompt_len": len(asked["prompt_ids"]),
                "output_len": end["output_len"] if end else 0,
                "cached_tokens": end["cached_tokens"] if end else None,
                "retractions": end["retractions"] if end else None,
                "finish_reason": reason,
                "refusal": refused.get(request.rid) if reason == schema.REFUSED else None,
                "output_ids": end["output_ids"] if end else None,
                **asked,
                **_evicted(request, kept),
            }
        )
    records.sort(key=lambda r: (r["index"], r["rid"]))
    table = pa.Table.from_pylist(records, schema=schema.REQUESTS)
    journal.write_durably(run.path / REQUESTS_FILE, lambda p: pq.write_table(table, p, compression="zstd"))
    counts: dict[str, int] = {}
    for r in records:
        counts[r["finish_reason"]] = counts.get(r["finish_reason"], 0) + 1
    return counts


def workload_columns(request: Request) -> dict[str, Any]:
    """What `requests.parquet` has of a request before it is served (`run.workload_digest.COLUMNS`)."""
    return {
        "index": request.index,
        "family": request.family,
        "prompt_ids": list(request.prompt_ids),
        "segments": [{"name": s.name, "start": s.start, "end": s.end} for s in request.spans],
        "sampling_params": json.dumps(recorded(request.sampling_params)),
        "labels": [asdict(label) for label in request.labels] or None,
        **{name: getattr(request.truth, name, None) for name in schema.TRUTH.names},
    }


def _evicted(request: Request, kept: KeptFile | None) -> dict[str, Any]:
    key = request.ask.evict
    if key is None or kept is None:
        return {}
    return {"evict": key, "cache_len": kept.shapes[key][-1], "kept": kept.counts[key][0].reshape(-1).tolist()}
