"""`requests.parquet` against the engine's own table, the workload's digest, and SGLang's count of cached tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from sglang_probe.run import schema, seal
from sglang_probe.run.damage import reading
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.run import Run
from sglang_probe.run.workload_digest import COLUMNS, digest_of_columns
from sglang_probe.verify import segment
from sglang_probe.verify.check import Check

Array = np.ndarray[Any, Any]
_COUNTS = ("prompt_len", "output_len", "cached_tokens", "retractions")


def requests_are_the_engines(run: Run) -> Check:
    """`requests.parquet` has every request that the engine served, with what the engine said of it."""
    name = "requests"
    claim = "requests.parquet has each request once, in every column what the engine said of it and what was asked"
    asked, ended = run.requests(interrupted=True), run.engine_requests()
    if not (seal.closed(run.manifest) or run.complete):
        why = "the run was not closed: requests.parquet, if it is there, is of an earlier end, and was not compared"
        return Check(name, claim, 0, "requests", None, why)
    violation = _the_same_requests(run, asked, ended) or _the_same_values(asked, ended) or _inside(run, asked)
    note: str | None = None
    if violation is None:
        violation, note = _workload(run, asked)
    return Check(name, claim, len(asked), "requests", violation, note)


def _the_same_requests(run: Run, asked: pd.DataFrame, ended: pd.DataFrame) -> str | None:
    if asked["rid"].duplicated().any():
        return f"{asked['rid'][asked['rid'].duplicated()].iloc[0]} is there twice"
    spans = run.spans()
    seen = set(ended["rid"]) | set(spans["rid"])
    refused = asked["rid"][(asked["finish_reason"] == schema.REFUSED) & (asked["prompt_len"] == 0)]
    if strange := set(asked["rid"]) - seen - set(refused):
        return f"{min(strange)} is in requests.parquet, and the engine never had it"
    has_end = asked["rid"].isin(ended["rid"])
    open_ended = asked["finish_reason"].isin(segment.WITHOUT_END)
    # One that was refused before it was queued never came to the engine.
    open_ended |= (asked["finish_reason"] == schema.REFUSED) & ~has_end & (asked["prompt_len"] == 0)
    if (wrong := open_ended == has_end).any():
        r = asked[wrong].iloc[0]
        said = "that it ended" if open_ended[wrong].iloc[0] else "of no end"
        return f"{r['rid']}: finish reason `{r['finish_reason']}`, and the engine said {said}"
    index = asked["index"]
    if segment.of(run) is None:
        expected = int(run.manifest["requests_expected"])
        if (index < 0).any():
            return f"{asked['rid'][index < 0].iloc[0]}: number {index.min()} in the workload"
        served = asked[~open_ended | asked["rid"].isin(refused)]
        if (again := served["index"].duplicated()).any():
            return f"request {served['index'][again].iloc[0]} of the workload was served twice"
        if run.complete and len(served) != expected:
            return f"{len(served)} of {expected} requests are in requests.parquet, and the run says it is complete"
        known = {r.split("~")[0] for r in asked["rid"]}
        if lost := {r for r in seen if r.split("~")[0] in known} - set(asked["rid"]):
            return f"{min(lost)} was served and is not in requests.parquet"
        if not index.is_monotonic_increasing:
            return "requests.parquet is not in workload order"
        return None
    if lost := seen - set(asked["rid"]):
        return f"{min(lost)} was served and is not in requests.parquet"
    if index.tolist() != list(range(len(index))):
        return "requests of the segment are not numbered one after the other"
    return None


def _the_same_values(asked: pd.DataFrame, ended: pd.DataFrame) -> str | None:
    both = asked.merge(ended, on="rid", suffixes=("", "_engine"))
    for column in (*_COUNTS, "finish_reason"):
        mine, theirs = both[column], both[f"{column}_engine"]
        if column in _COUNTS:
            mine, theirs = mine.astype(float), theirs.astype(float)
        if (wrong := (mine != theirs).to_numpy()).any():
            i = int(np.argmax(wrong))
            return f"{both['rid'].iloc[i]}: {column} is {mine.iloc[i]}, and the engine said {theirs.iloc[i]}"
    for rid, mine, theirs in zip(both["rid"], both["output_ids"], both["output_ids_engine"], strict=True):
        if (mine is None) != (theirs is None) or (mine is not None and not np.array_equal(mine, theirs)):
            return f"{rid}: output_ids are not those of the engine"
    alone = asked[~asked["rid"].isin(ended["rid"])]
    told = alone[["cached_tokens", "retractions", "output_ids"]].notna().any(axis=1) | (alone["output_len"] != 0)
    if told.any():
        return f"{alone['rid'][told].iloc[0]}: it has no end, and requests.parquet says how it ended"
    return None


def _inside(run: Run, asked: pd.DataFrame) -> str | None:
    """Lengths are those of the lists, and classes of tokens tile the prompt."""
    for r in asked.itertuples():
        length = None if pd.isna(r.prompt_len) else int(r.prompt_len)
        if r.prompt_ids is not None and len(r.prompt_ids) != length:
            return f"{r.rid}: prompt_len is {length}, and it has {len(r.prompt_ids)} prompt tokens"
        end = 0
        for s in r.segments:
            if s is None or s["name"] is None or s["start"] is None or s["end"] is None:
                return f"{r.rid}: a segment has no name or no end"
            if s["start"] != end or s["end"] < s["start"]:
                return (
                    f"{r.rid}: segment {s['name']} [{s['start']}, {s['end']}) does not begin where the one before ends"
                )
            end = s["end"]
        if length is not None and end != length and (len(r.segments) or segment.of(run) is None):
            return f"{r.rid}: its segments end at {end}, and its prompt at {length}"
    return None


def _workload(run: Run, asked: pd.DataFrame) -> tuple[str | None, str | None]:
    """The workload's columns against their digest from before anything was served."""
    digest = run.manifest.get("columns_digest")
    if segment.of(run) is not None:
        return None, None
    if digest is None:
        return None, "the manifest has no digest of the workload's columns: families and segments were not compared"
    if (asked["finish_reason"] == schema.REFUSED).any():
        return None, "a request was refused and another prompt served in its place: the workload was not compared"
    if asked["index"].nunique() != int(run.manifest["requests_expected"]):
        return None, "requests of the workload are missing: it was not compared with its digest"
    if digest_of_columns(_each_once(run)) != digest:
        return "requests.parquet does not hold the workload that the manifest names (columns_digest)", None
    repeated = asked[asked["index"].duplicated(keep=False)]
    prompts = [tuple(x) for x in repeated["prompt_ids"]]
    if len(repeated) and repeated.assign(prompt=prompts).groupby("index")["prompt"].nunique().max() > 1:
        return "a request that was asked again has another prompt than before", None
    return None, None


def _each_once(run: Run) -> Iterator[dict[str, Any]]:
    path, last = run.path / REQUESTS_FILE, None
    with reading(path):
        file = pq.ParquetFile(path)
        names = [name for name in COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=1024, columns=names):
            ids = batch.column(names.index("prompt_ids"))
            rest = batch.select([n for n in names if n != "prompt_ids"]).to_pylist()
            for i, record in enumerate(rest):
                if record["index"] != last:
                    last = record["index"]
                    yield {**record, "prompt_ids": ids[i].values.to_numpy()}


def reuse_reconciles(run: Run) -> Check:
    """Per request, reused positions of the first attempt equal SGLang's `cached_tokens`, which counts only those."""
    name, claim = "reuse", "reused positions per request equal SGLang's own cached_tokens"
    spans = run.spans()
    reused = spans[(spans["status"] == schema.REUSED) & (spans["attempt"] == 0)]
    per_request = (reused["end"] - reused["start"]).groupby(reused["rid"]).sum()
    requests = run.engine_requests()
    elsewhere = requests["rid"].isin(segment.not_wholly_here(run))
    requests = requests[~elsewhere]
    ours = requests["rid"].map(per_request).fillna(0).astype(int)
    wrong = requests[ours != requests["cached_tokens"]]
    disagreements = run.manifest.get("cached_tokens_disagreements") or []
    retracted = int((requests["retractions"] > 0).sum())
    note = f"{retracted} requests were retracted; SGLang counts their first attempt only" if retracted else None
    if elsewhere.any():
        note = f"{note}; " if note else ""
        note += f"not asked of {int(elsewhere.sum())} requests that began in another segment or were dropped in part"
    violation = None
    if len(wrong):
        r = wrong.iloc[0]
        violation = f"{r['rid']}: {int(ours[wrong.index[0]])} reused in the ledger, {r['cached_tokens']} by SGLang"
    elif disagreements:
        violation = f"{disagreements[0]}: the API's cached_tokens differs from the scheduler's"
    return Check(name, claim, len(requests), "requests", violation, note)
