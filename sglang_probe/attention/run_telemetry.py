"""Attention telemetry of the decode steps of a run, from its captured queries and keys, as one Parquet file.

A row is one step of one query head of one layer of one request. The definitions are those of `attention/telemetry.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sglang_probe.attention.from_run import attention_rows
from sglang_probe.attention.telemetry import entropy, jump_scores, mass_by_region, top_positions
from sglang_probe.errors import ProbeError
from sglang_probe.run.hook_points import ROTATED_KEY, ROTATED_QUERY, parse_hook_point
from sglang_probe.run.run import Run
from sglang_probe.run.telemetry_options import REGIONS, TelemetryOptions

TELEMETRY = pa.schema(
    [
        pa.field("rid", pa.string()),
        pa.field("layer", pa.int16()),
        pa.field("head", pa.int16()),
        pa.field("step", pa.int32()),
        pa.field("entropy", pa.float32()),  # over the logarithm of the number of visible keys
        pa.field("entropy_without_sinks", pa.float32()),  # the rest renormalised
        pa.field("support", pa.float32()),  # exp(entropy in nats)
        *(pa.field(f"mass_{region}", pa.float32()) for region in REGIONS),
        pa.field("jump", pa.float32()),  # NaN until `memory` steps were measured
        pa.field("top_positions", pa.list_(pa.int32())),  # most weight first
        pa.field("top_weights", pa.list_(pa.float32())),
        pa.field("top_segments", pa.list_(pa.string())),
    ]
)


def write_telemetry(run: Run, path: Path, options: TelemetryOptions | None = None) -> int:
    """Write the telemetry of every request that decoded, at every layer with captured queries and keys.

    Returns:
        Number of rows written.

    Raises:
        ProbeError: no layer has both post-RoPE queries and keys. RunDirectoryError: a position has no row.
    """
    options = options or TelemetryOptions()
    layers = captured_layers(run)
    if not layers:
        raise ProbeError(
            f"{run.path} has no layer with captured queries and keys",
            fix=f"record `blocks.<layer>.{ROTATED_QUERY}` and `blocks.<layer>.{ROTATED_KEY}`",
        )
    count = 0
    schema = TELEMETRY.with_metadata({"options": options.model_dump_json()})
    with pq.ParquetWriter(path, schema, compression="zstd") as out:
        for table in _tables(run, layers, options, schema):
            out.write_table(table)
            count += len(table)
    return count


def captured_layers(run: Run) -> list[int]:
    """Layers of which both post-RoPE queries and keys were captured."""
    points = [parse_hook_point(h) for h in run.hook_points]
    found = [{p.layer for p in points if p.site == site} for site in (ROTATED_QUERY, ROTATED_KEY)]
    return sorted(layer for layer in found[0] & found[1] if layer is not None)


def _tables(run: Run, layers: list[int], options: TelemetryOptions, schema: pa.Schema) -> Iterator[pa.Table]:
    tokens = run.tokens()
    segments = {rid: mine.sort_values("position")["segment"].to_numpy(str) for rid, mine in tokens.groupby("rid")}
    requests = run.requests()
    for r in requests[requests["output_len"] > 1].itertuples():
        for layer in layers:
            yield pa.Table.from_pandas(
                step_telemetry(run, r.rid, layer, segments[r.rid], options), schema=schema, preserve_index=False
            )


def step_telemetry(run: Run, rid: str, layer: int, segment_J: np.ndarray, options: TelemetryOptions) -> pd.DataFrame:
    """Telemetry of one request at one layer, columns as in `TELEMETRY`.

    Args:
        segment_J: class of each position (column `segment` of `run.tokens()`), at least as many as have a KV entry.
    """
    rows = attention_rows(run, rid, layer, window=0)
    a = rows.decode_attention().flatten(0, 1)  # [H, T, J]
    heads, _, keys = a.shape
    measured = torch.arange(0, a.shape[1], options.every)
    segment_J = segment_J[:keys]
    whole, rest = (entropy(a, rows.length, sinks=s) for s in (0, options.sinks))
    mass = mass_by_region(a, regions_of(segment_J, rows.length, options), len(REGIONS))
    top, weights = top_positions(a, min(options.top_k, rows.length))

    top, weights = top[:, measured], weights[:, measured]
    jump = jump_scores(a[:, measured], rows.length, memory=options.memory)

    def flat(x: Tensor) -> np.ndarray:
        return x.flatten(0, 1).float().numpy()

    columns = {
        "rid": rid,
        "layer": layer,
        "head": np.repeat(np.arange(heads), len(measured)),
        "step": np.tile(measured.numpy(), heads),
        "entropy": flat(whole.normalised[:, measured]),
        "entropy_without_sinks": flat(rest.normalised[:, measured]),
        "support": flat(whole.support[:, measured]),
        **{f"mass_{region}": flat(mass[:, measured, i]) for i, region in enumerate(REGIONS)},
        "jump": flat(jump),
        "top_positions": list(top.flatten(0, 1).numpy()),
        "top_weights": list(flat(weights)),
        "top_segments": list(segment_J[top.flatten(0, 1).numpy()]),
    }
    return pd.DataFrame(columns)


def regions_of(segment_J: np.ndarray, length: int, options: TelemetryOptions) -> Tensor:
    """Number in `REGIONS` of each key of a prompt of `length` and what was generated after it, `[J]`."""
    at = np.arange(len(segment_J))
    chosen = [at >= length, at < options.sinks, at >= length - options.window, segment_J == "system"]
    return torch.from_numpy(np.select(chosen, [4, 0, 3, 1], default=2))
