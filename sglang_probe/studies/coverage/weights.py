"""The correction weights of a map as a file: for runs of computed positions, how much each row should count.

    rid, start, end, weight

Positions `[start, end)` of the request count `weight` each. Positions that no row of the file names (reused, dropped)
have no captured row. `Run.iter_batches(weight=PATH)` draws each row as often as its weight says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sglang_probe.studies.coverage.result import Map
from sglang_probe.studies.coverage.reuse import COMPUTED
from sglang_probe.studies.coverage.study import Study
from sglang_probe.studies.coverage.walk import Runs, Step

Array = np.ndarray[Any, Any]

SCHEMA = pa.schema([("rid", pa.string()), ("start", pa.int32()), ("end", pa.int32()), ("weight", pa.float64())])


def write_weights(study: Study, maps: list[Map], folder: Path) -> dict[str, Path]:
    """Write `weights-<axes>.parquet` for each map, in one pass. Returns the files by the map's name."""
    files = {m.name: folder / f"weights-{'-'.join(m.axes)}.parquet" for m in maps}
    temporary = {name: path.with_name(f".{path.name}.tmp") for name, path in files.items()}
    writers = {name: pq.ParquetWriter(path, SCHEMA, compression="zstd") for name, path in temporary.items()}
    tables = {m.name: _table(m, study) for m in maps}
    try:
        for step, labels in study.labelled():
            fate = step.each_fate()
            runs = step.runs(fate, *labels.values())
            computed = fate[runs.start] == COMPUTED
            told = {name: label[runs.start] for name, label in labels.items()}
            for m in maps:
                cells = [told[a] for a in m.axes]
                writers[m.name].write_table(_ranges(step, study, runs, computed, tables[m.name], cells))
    finally:
        for writer in writers.values():
            writer.close()
    for name, path in files.items():
        temporary[name].replace(path)
    return files


def _table(m: Map, study: Study) -> Array:
    """Weight of each cell of the map's axes."""
    sizes = [len(next(a for a in study.axes if a.name == name).classes) for name in m.axes]
    table = np.full(sizes, np.nan)
    table[tuple(m.classes[name].cat.codes.to_numpy() for name in m.axes)] = m.classes["weight"]
    return table


def _ranges(step: Step, study: Study, runs: Runs, computed: Array, table: Array, labels: Sequence[Array]) -> pa.Table:
    """Rows of the file: neighbouring runs of a request whose cell is the same are one."""
    batch = step.batch
    cell = labels[0].astype(np.int32)
    for more, size in zip(labels[1:], table.shape[1:], strict=True):
        cell = cell * np.int32(size) + more
    cell = np.where(computed, cell, np.int32(-1))
    first = np.ones(len(cell), dtype=bool)
    first[1:] = (cell[1:] != cell[:-1]) | (runs.request[1:] != runs.request[:-1])
    ends = np.append(runs.start[first][1:], len(batch))
    kept = cell[first] >= 0
    low, high = runs.start[first][kept], ends[kept]
    request, cell = runs.request[first][kept], cell[first][kept]
    shift = batch.begin[request] - batch.offsets[request]
    rids = study.walk.requests.rid
    return pa.table(
        {
            "rid": rids.take(pa.array(request + step.low)).cast(pa.string()),
            "start": (low + shift).astype(np.int32),
            "end": (high + shift).astype(np.int32),
            "weight": table.ravel()[cell],
        },
        schema=SCHEMA,
    )
