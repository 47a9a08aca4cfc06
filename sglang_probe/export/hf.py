"""A run as a dataset of the Hugging Face hub: Parquet files and a card, opened by `datasets.load_dataset(FOLDER)`.

A row for each computed position: whose it is, what became of it, and a list of numbers for each hook point. Rows that
were recorded as bfloat16 are stored as float32, which holds them exactly: Parquet has no bfloat16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sglang_probe.errors import ConfigError
from sglang_probe.export.folder import model_name, new_folder
from sglang_probe.run import journal
from sglang_probe.run.batches import in_parts
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run
from sglang_probe.run.schema import REUSED

ROWS_PER_FILE = 50_000
_GROUP = 5_000
COLUMNS = ["rid", "position", "token_id", "segment", "phase", "forward_id", "family"]


def export_hf(
    run: Run,
    folder: Path,
    *,
    hook_points: Sequence[str] | None = None,
    where: str | None = None,
    overwrite: bool = False,
    rows_per_file: int = ROWS_PER_FILE,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Write a run; returns the number of rows.

    Args:
        hook_points: which; default: all. A position is written if all of them hold it.
        where: which positions, a pandas query over the columns of `run.tokens()`.

    Raises:
        ConfigError: the folder is there, no hook point was captured or no row is left.
        RunDirectoryError: the run lacks a hook point.
    """
    points = list(hook_points or run.hook_points)
    if not points:
        raise ConfigError(f"{run.path} has no captured rows")
    phases: Counter[str] = Counter()
    for tokens in _held(run, points, where):
        phases.update(tokens["phase"].value_counts(sort=False).to_dict())
    total = phases.total()
    if not total:
        raise ConfigError(f"{run.path} has no computed position whose row all of {', '.join(points)} hold")
    families = run.requests_table(["rid", "family"]).to_pandas().set_index("rid")["family"]
    files = -(-total // rows_per_file)
    groups = _groups(_held(run, points, where), rows_per_file)
    with new_folder(folder, overwrite=overwrite) as made:
        (made / "data").mkdir()
        done = 0
        for i in range(files):
            path = made / "data" / f"train-{i:05d}-of-{files:05d}.parquet"
            writer = None
            last = min((i + 1) * rows_per_file, total)
            while done < last:
                tokens = next(groups)
                table = _table(run, points, tokens.assign(family=tokens["rid"].map(families)))
                writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
                writer.write_table(table)
                done += len(tokens)
                tell(done, total)
            assert writer is not None
            writer.close()
        (made / "README.md").write_text(_card(run, points, phases), encoding="utf-8")
    return total


def _held(run: Run, points: Sequence[str], where: str | None) -> Iterator[pd.DataFrame]:
    """Positions that are written, some requests at a time."""
    for tokens in in_parts(run, where, name="--where"):
        rows = tokens["row"].to_numpy()
        yield tokens[np.logical_and.reduce([run.holds(p, rows) for p in points])]


def _groups(frames: Iterable[pd.DataFrame], rows_per_file: int) -> Iterator[pd.DataFrame]:
    """The same positions in groups that are written at once: of one size, but that files end where they should."""
    left = pd.DataFrame()
    done, size = 0, min(_GROUP, rows_per_file)
    for frame in frames:
        left = frame if left.empty else pd.concat([left, frame], ignore_index=True)
        while len(left) >= size:
            yield left.iloc[:size]
            left, done = left.iloc[size:], done + size
            size = min(_GROUP, rows_per_file - done % rows_per_file)
    if len(left):
        yield left


def _table(run: Run, points: Sequence[str], tokens: pd.DataFrame) -> pa.Table:
    columns: dict[str, Any] = {
        name: pa.array(tokens[name].astype(str).where(tokens[name].notna(), None), pa.string())
        if name in ("rid", "segment", "phase", "family")
        else pa.array(tokens[name].to_numpy(), pa.int64())
        for name in COLUMNS
    }
    for point in points:
        x = run.rows(point, tokens["row"].to_numpy()).float().numpy()
        flat = pa.array(np.ascontiguousarray(x).reshape(-1), pa.float32())
        columns[point] = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    return pa.table(columns)


def _card(run: Run, points: Sequence[str], counted: Counter[str]) -> str:
    m = run.manifest
    model = m.get("model") or {}
    versions = m.get("versions") or {}
    spans = run.last_attempt()
    spans = spans[(spans["status"] == REUSED) & spans["rid"].isin(run.requests_table(["rid"])["rid"].to_pandas())]
    reused = int((spans["end"] - spans["start"]).sum())
    phases = ", ".join(f"{n:,} {phase}" for phase, n in counted.most_common())
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        "    path: data/*.parquet",
        "tags:",
        "- activations",
        "- sglang-probe",
        "---",
        "",
        "# Activations recorded by sglang-probe",
        "",
        f"{counted.total():,} rows ({phases}) of {', '.join(f'`{p}`' for p in points)}: one for each token position "
        "that the engine computed, with the request, position and token that it belongs to. "
        "`datasets.load_dataset(FOLDER)` opens it.",
        "",
        f"* model: `{model_name(str(model.get('name')))}`; weights: `{model.get('weights_sha256')}`",
        f"* recorded as {m.get('dtype')}, stored as float32, which holds bfloat16 exactly",
        f"* SGLang {versions.get('sglang')}, sglang-probe {versions.get('sglang-probe')}; "
        f"manifest SHA-256 `{journal.sha256(run.path / MANIFEST)}`",
        f"* {reused:,} further positions were served from the prefix cache and have no row of their own: what many "
        "requests share is here once, and so less often than in the traffic",
        "* positions under interventions are left out",
        "",
        "Token ids are included, and rows can be inverted to text in part: treat this folder like the text it came "
        "from.",
    ]
    return "\n".join(lines) + "\n"
