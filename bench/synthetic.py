"""A made-up run directory of any size, with the structure of few-shot traffic on a cached server.

    python bench/synthetic.py OUT [--requests 200000] [--seed 0] [--width 0]

Every request is a short part that all share, a prefix of its family, a question of its own, and an output. The first
request of a family computes the prefix, later ones reuse it; now and then it was evicted and is computed again. Token
ids are drawn at random. The ledger's invariants hold. With `--width` every computed position has a row of random
bfloat16 numbers, of so many, at `blocks.0.hook_resid_post`.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from sglang_probe.run import journal, schema
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.shards import ROWS_KEY

TEMPLATE, FAMILY_SIZE, EVICTED, PIECE = 24, 100, 0.02, 48
VOCABULARY = (6, 3072)  # the ordinary tokens of `probe-text`
NAMES = ["template", "system", "exemplar", "user"]
BLOCK = 20_000
HOOK_POINT = "blocks.0.hook_resid_post"
_COLUMNS = [*schema.ENGINE_REQUESTS.names, "index", "family", "prompt_ids", "segments", "sampling_params"]
_SCHEMA = pa.schema([schema.REQUESTS.field(name) for name in _COLUMNS])


def generate(out: Path, requests: int, seed: int = 0, parts: int = 20, width: int = 0) -> int:
    """Write the run; returns its number of positions (500 a request on average)."""
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True)
    families = max(1, requests // FAMILY_SIZE)
    family = rng.permutation(np.arange(requests) % families)
    system, exemplar = rng.integers(40, 120, families), rng.integers(60, 360, families)
    shared = TEMPLATE + system + exemplar
    own = 8 + rng.geometric(1 / 80, requests)
    output = 1 + rng.integers(1, 209, requests)
    prompt = shared[family] + own
    prefix_ids = rng.integers(*VOCABULARY, (families, int(shared.max())), dtype=np.int32)
    prefix_ids[:, :TEMPLATE] = prefix_ids[0, :TEMPLATE]

    rid = pa.array([f"r{i:07d}" for i in range(requests)])
    edges = np.stack(
        [np.zeros(requests, int), np.full(requests, TEMPLATE), TEMPLATE + system[family], shared[family], prompt]
    ).astype(np.int32)
    cached, spans = _spans(rng, family, shared, prompt, output, rid)
    # Some requests at a time: their token ids are most of the run.
    with pq.ParquetWriter(out / REQUESTS_FILE, _SCHEMA, compression="zstd") as writer:
        for low in range(0, requests, BLOCK):
            mine = slice(low, min(low + BLOCK, requests))
            n = mine.stop - low
            ids, own_ids = (_lists(rng, lengths[mine]) for lengths in (prompt, output))
            values, offsets = ids.values.to_numpy(zero_copy_only=False).copy(), ids.offsets.to_numpy()
            for r, f in enumerate(family[mine].tolist()):  # the family's prefix, then random tokens
                values[offsets[r] : offsets[r] + int(shared[f])] = prefix_ids[f, : int(shared[f])]
            segments = pa.StructArray.from_arrays(
                [pa.array(NAMES * n), *(pa.array(edges[at, mine].T.ravel()) for at in (slice(0, -1), slice(1, None)))],
                names=["name", "start", "end"],
            )
            table = {
                "rid": rid[mine],
                "prompt_len": pa.array(prompt[mine].astype(np.int32)),
                "output_len": pa.array(output[mine].astype(np.int32)),
                "cached_tokens": pa.array(cached[mine].astype(np.int32)),
                "retractions": pa.array(np.zeros(n, np.int32)),
                "finish_reason": pa.array(["length"] * n),
                "output_ids": own_ids,
                "index": pa.array(np.arange(low, low + n)),
                "family": pa.array([f"f{f}" for f in family[mine]]),
                "prompt_ids": pa.ListArray.from_arrays(ids.offsets, pa.array(values)),
                "segments": pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * len(NAMES)), segments),
                "sampling_params": pa.array(["{}"] * n),
            }
            writer.write_table(pa.table({name: table[name] for name in _SCHEMA.names}, schema=_SCHEMA))
    end = 0
    if width:
        spans, rows = _numbered(spans)
    for number, (a, b) in enumerate(pairwise(np.linspace(0, len(spans), parts + 1).astype(int))):
        here = int(rows[a:b].sum()) if width else 0
        end += here
        part = journal.Part(number, 0, 0, end, here)
        file = f"ledger/spans-{number:05d}.parquet"
        part.files[file] = journal.write_durably(
            out / file, lambda p, a=a, b=b: pq.write_table(spans.slice(a, b - a), p)
        )
        if width:
            file = f"rows/{HOOK_POINT}/shard-{part.stem}.safetensors"
            values = torch.from_numpy(rng.standard_normal((here, width), dtype=np.float32)).bfloat16()
            part.files[file] = journal.write_durably(out / file, lambda p, x=values: save_file({ROWS_KEY: x}, p))
        journal.append(out, part)
    manifest = {"schema_version": schema.SCHEMA_VERSION, "status": "complete", "name": out.name}
    manifest |= {"hook_points": {HOOK_POINT: ""} if width else {}, "requests_expected": requests}
    (out / MANIFEST).write_text(json.dumps(manifest))
    return int((prompt + output - 1).sum())


def _numbered(spans: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """Spans with the rows of computed positions numbered in their order, and how many each has."""
    lengths = spans["end"].to_numpy() - spans["start"].to_numpy()
    rows = np.where(spans["status"].to_numpy() == schema.COMPUTED, lengths, 0).astype(np.int64)
    first = np.where(rows > 0, np.cumsum(rows) - rows, -1)
    spans = spans.set_column(spans.column_names.index("row_start"), "row_start", pa.array(first))
    step = pa.array(np.ones(len(rows), np.int32))
    return spans.set_column(spans.column_names.index("row_step"), "row_step", step), rows


def _lists(rng: np.random.Generator, lengths: np.ndarray) -> pa.ListArray:
    """Random token ids, a list of each length."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rng.integers(*VOCABULARY, offsets[-1], dtype=np.int32)))


def _spans(
    rng: np.random.Generator,
    family: np.ndarray,
    shared: np.ndarray,
    prompt: np.ndarray,
    output: np.ndarray,
    rid: pa.Array,
) -> tuple[np.ndarray, pa.Table]:
    """Cached tokens of each request, and the spans: reused and prefilled prompt, output in pieces of about PIECE."""
    requests = len(family)
    order = np.lexsort([np.arange(requests), family])
    fresh = np.diff(family[order], prepend=-1) != 0
    fresh |= rng.random(requests) < EVICTED
    source = np.empty(requests, dtype=np.int64)
    source[order] = order[np.maximum.accumulate(np.where(fresh, np.arange(requests), 0))]
    reuses = source != np.arange(requests)
    cached = np.where(reuses, shared[family], 0)
    pieces = -(-(output - 1) // PIECE)
    number = np.repeat(np.arange(requests), pieces)
    nth = np.arange(len(number)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    reused, whole = np.flatnonzero(reuses), np.arange(requests)
    end = prompt + output - 1
    request = np.concatenate([reused, whole, number])
    start = np.concatenate([np.zeros(len(reused), int), cached, prompt[number] + nth * PIECE])
    stop = np.concatenate([cached[reused], prompt, np.minimum(prompt[number] + (nth + 1) * PIECE, end[number])])
    kind = np.repeat([0, 1, 2], [len(reused), requests, len(number)])
    rows = np.argsort(request, kind="stable")
    origin = np.where(kind == 0, source[request], -1)
    n = len(rows)
    columns = {
        "rid": rid.take(pa.array(request[rows])),
        "attempt": pa.array(np.zeros(n, np.int32)),
        "start": pa.array(start[rows].astype(np.int32)),
        "end": pa.array(stop[rows].astype(np.int32)),
        "status": pa.array(np.array(["reused", "computed", "computed"])[kind[rows]]),
        "phase": pa.array(np.array(["", "prefill", "decode"])[kind[rows]], mask=kind[rows] == 0),
        "forward_id": pa.array(request[rows] + nth.max(initial=0)),
        "chunk": pa.array(np.where(kind[rows] == 2, -1, 0).astype(np.int32)),
        "tier": pa.array(np.full(n, "device"), mask=kind[rows] != 0),
        "row_start": pa.array(np.full(n, -1)),
        "row_step": pa.array(np.zeros(n, np.int32)),
        "origin_rid": rid.take(pa.array(origin[rows], mask=origin[rows] < 0)),
        "origin_attempt": pa.array(np.zeros(n, np.int32), mask=origin[rows] < 0),
        "intervention": pa.nulls(n, pa.string()),
    }
    return cached, pa.table(columns, schema=schema.SPANS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=0)
    args = parser.parse_args()
    print(f"{generate(args.out, args.requests, args.seed, width=args.width):,} positions")


if __name__ == "__main__":
    main()
