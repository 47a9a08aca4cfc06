"""Plain access to the files of a run directory: manifest, tables, rows and parts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import journal, schema, shards
from sglang_probe.run.damage import FIX, read_table, reading, require_columns
from sglang_probe.run.hook_points import score_points
from sglang_probe.run.manifest import MANIFEST, read_manifest
from sglang_probe.run.selection import Selected

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
REQUESTS_FILE = "requests.parquet"


def no_run(path: Path) -> RunDirectoryError:
    """What is said of a path that has no manifest: of a folder of runs, which ones are in it."""
    if not path.exists():
        return RunDirectoryError(f"{path} does not exist", fix="give the path of a run directory")
    if not path.is_dir():
        return RunDirectoryError(f"{path} is a file, not a run directory", fix="give the folder that it is in")
    within = sorted(p.parent.name for p in path.glob(f"*/{MANIFEST}"))
    fix = f"name one of the runs in it: {', '.join(within[:8])}" if within else "see `sglang-probe harvest`"
    return RunDirectoryError(f"{path} is not a run directory: it has no {MANIFEST}", fix=fix)


class RunFiles:
    """The files of one run. `Run`, which users hold, adds what is put together from several of them.

    Raises (on construction):
        RunDirectoryError: there is no manifest, it is damaged, or it was written by a newer schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / MANIFEST
        if not file.exists():
            raise no_run(path)
        self.manifest: dict[str, Any] = read_manifest(file)
        if self.manifest["schema_version"] > schema.SCHEMA_VERSION:
            raise RunDirectoryError(
                f"{path} has schema version {self.manifest['schema_version']}; "
                f"this package reads up to {schema.SCHEMA_VERSION}",
                fix="upgrade sglang-probe",
            )

    @property
    def complete(self) -> bool:
        """Whether every request of the workload was served and everything is on disk."""
        return bool(self.manifest["status"] == "complete")

    @property
    def hook_points(self) -> list[str]:
        return list(self.manifest["hook_points"])

    def spans(self) -> pd.DataFrame:
        """One row per span: consecutive positions of one request with the same fate (`schema.SPANS`)."""
        return self._table("spans", schema.SPANS)

    def forwards(self) -> pd.DataFrame:
        """One row per forward pass (`schema.FORWARDS`)."""
        return self._table("forwards", schema.FORWARDS)

    def requests(self, *, interrupted: bool = False) -> pd.DataFrame:
        """One row per request that was served, in workload order (`schema.REQUESTS`).

        `interrupted` adds those that were in flight when their engine died; a resumed run asks them again under
        another rid, so that counting both would count a request twice.
        """
        frame = self._requests_table().to_pandas()
        return frame if interrupted else frame[frame["finish_reason"] != schema.INTERRUPTED].reset_index(drop=True)

    def requests_table(self, columns: Sequence[str]) -> pa.Table:
        """Columns of `requests()` as they are stored: without an object for every request and list."""
        table = self._requests_table(columns)
        return table.filter(pc.not_equal(table["finish_reason"], schema.INTERRUPTED)).select(list(columns))

    def engine_requests(self) -> pd.DataFrame:
        """What the engine said of each finished request (`schema.ENGINE_REQUESTS`); survives an interrupted run."""
        return self._table("requests", schema.ENGINE_REQUESTS)

    def rebinds(self) -> pd.DataFrame:
        """Positions that a request computed itself and whose KV entry was later replaced by another request's
        (`schema.REBINDS`)."""
        return self._table("rebinds", schema.REBINDS)

    def tree(self) -> pd.DataFrame:
        """What the radix tree took, gave and lost (`schema.TREE`); empty in runs of a schema version below 6."""
        return self._table("tree", schema.TREE)

    def prompts(self) -> pd.DataFrame:
        """Prompts of a live recording as its privacy level allows (`schema.PROMPTS`); empty under `none`, and of a
        harvest."""
        return self._table("prompts", schema.PROMPTS)

    def interventions(self) -> pd.DataFrame:
        """Requests that ran under interventions, and which (`schema.INTERVENTIONS`); one row per request."""
        return self._table("interventions", schema.INTERVENTIONS).drop_duplicates("rid", ignore_index=True)

    def budget(self) -> pd.DataFrame:
        """What became of the budget of interventions (`schema.BUDGET`), in the order of time."""
        return self._table("budget", schema.BUDGET)

    def withheld(self) -> pd.DataFrame:
        """Positions whose rows were taken out of this run, and why (`schema.WITHHELD`, `sglang-probe scrub`)."""
        return self._table("withheld", schema.WITHHELD)

    def monitored(self) -> pd.DataFrame:
        """Decode rows that a server's monitor read (`schema.MONITORED`); `monitor` of the manifest names the columns of
        `values`."""
        return self._table("monitored", schema.MONITORED)

    def gates(self) -> pd.DataFrame:
        """Decisions of gates by a probe, open and closed ones (`schema.GATES`); one row per request."""
        return self._table("gates", schema.GATES).drop_duplicates("rid", ignore_index=True)

    def telemetry_table(self) -> pd.DataFrame:
        """One row per measured decode step and layer, as it is stored (`schema.TELEMETRY`)."""
        return self._table("telemetry/part-", schema.TELEMETRY)

    def last_attempt(self) -> pd.DataFrame:
        """Spans of each request's last attempt: the ones that tile its positions."""
        spans = self.spans()
        return spans[spans["attempt"] == spans.groupby("rid")["attempt"].transform("max")]

    def heads(self, hook_point: str) -> tuple[int, int]:
        """Heads and head dimension of a hook point whose rows are per head: of keys and values the kv heads.

        Raises:
            RunDirectoryError: it was not captured, or its rows are not per head.
        """
        if hook_point not in self.manifest.get("heads", {}):
            raise RunDirectoryError(
                f"{self.path} has no rows per head of `{hook_point}`",
                fix=f"captured hook points: {', '.join(self.hook_points) or 'none'}",
            )
        heads, head_dim = self.manifest["heads"][hook_point]
        return int(heads), int(head_dim)

    def head_numbers(self, hook_point: str) -> list[int]:
        """Which heads of the model the rows of a hook point hold (`rows: heads` of the configuration), ascending.

        Raises:
            RunDirectoryError: as `heads`.
        """
        count, _ = self.heads(hook_point)
        chosen = self.manifest.get("head_numbers", {}).get(hook_point)
        return list(range(count)) if chosen is None else [int(h) for h in chosen]

    @functools.cached_property
    def selected(self) -> Selected:
        """Which positions the hook points hold (`rows` of the configuration)."""
        with reading(self.path / MANIFEST):
            return Selected.from_manifest(self.manifest)

    def holds(self, hook_point: str, indices: Sequence[int] | Array) -> Array:
        """Which rows a hook point holds, bool `[len(indices)]`: those that were computed and selected; not -1."""
        wanted = np.asarray(indices, dtype=np.int64)
        if hook_point not in self.selected.partial:
            return np.asarray(wanted >= 0)
        held = np.zeros(len(wanted), dtype=bool)
        for start, end, path in self.shards_of(hook_point):
            at = np.flatnonzero((wanted >= start) & (wanted < end))
            held[at] = shards.place_of(path, wanted[at] - start) >= 0
        return held

    def rows_dtype(self) -> torch.dtype | None:
        """Dtype of the captured rows; None without any."""
        scores = score_points(self.hook_points)  # fp32 in any case
        held = (self.shards_of(h) for h in self.hook_points if h not in scores and self._holds_any(h))
        return next((shards.rows_of(found[0][2]).dtype for found in held), None)

    def rows(self, hook_point: str, indices: Sequence[int] | Array, *, split_heads: bool = False) -> torch.Tensor:
        """Captured rows by their index in the row store, `[len(indices), width]`, in the model's dtype.

        With `split_heads`, `[len(indices), heads, head_dim]` (see `heads`).

        Raises:
            RunDirectoryError: the hook point was not captured, or does not hold one of the rows (see `holds`).
        """
        import torch

        if split_heads:
            rows = self.rows(hook_point, indices)
            return rows.view(len(rows), *self.heads(hook_point))
        found_in = self.shards_of(hook_point)
        wanted = np.asarray(indices, dtype=np.int64)
        pieces: list[tuple[Array, torch.Tensor]] = []
        found = 0
        for start, end, path in found_in:
            at = np.flatnonzero((wanted >= start) & (wanted < end))
            if len(at):
                place = shards.place_of(path, wanted[at] - start)
                at, place = at[place >= 0], place[place >= 0]
                pieces.append((at, shards.rows_of(path)[torch.from_numpy(place)]))
                found += len(at)
        if found != len(wanted):
            partial = " or were not selected (`run.holds` says which)" if hook_point in self.selected.partial else ""
            raise RunDirectoryError(
                f"{self.path}: {len(wanted) - found} of the asked rows of {hook_point} do not exist{partial}"
            )
        if not pieces:
            return torch.empty((0, shards.rows_of(found_in[0][2]).shape[1]))
        out = torch.empty((len(wanted), pieces[0][1].shape[1]), dtype=pieces[0][1].dtype)
        for at, values in pieces:
            out[torch.from_numpy(at)] = values
        return out

    def rows_into(self, hook_point: str, indices: Array, out: torch.Tensor, at: Array) -> None:
        """As `rows`, into `out[at]`; what is read takes no other memory, and no file is held open or mapped. For many
        rows at a time.

        Args:
            out: `[N, width]`, contiguous, of the dtype and width that `row_layout` gives.

        Raises:
            RunDirectoryError: as `rows`.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        found = 0
        for start, end, path in self.shards_of(hook_point):
            here = np.flatnonzero((wanted >= start) & (wanted < end))
            if len(here):
                place = shards.place_of(path, wanted[here] - start)
                here, place = here[place >= 0], place[place >= 0]
                shards.read_into(path, place, out, at[here])
                found += len(here)
        if found != len(wanted):
            raise RunDirectoryError(
                f"{self.path}: {len(wanted) - found} of the asked rows of {hook_point} do not exist"
            )

    def row_layout(self, hook_point: str) -> tuple[int, torch.dtype]:
        """Width and dtype of a hook point's rows.

        Raises:
            RunDirectoryError: it was not captured.
        """
        return shards.layout_of(self.shards_of(hook_point)[0][2])

    def iter_shards(self, hook_point: str) -> Iterator[tuple[Array, torch.Tensor]]:
        """Every shard of a hook point as `(numbers of its rows [n], ascending; rows [n, width])`."""
        for start, _end, path in self.shards_of(hook_point) if self._holds_any(hook_point) else []:
            rows, index = shards.rows_of(path), shards.index_of(path)
            yield start + (np.arange(len(rows)) if index is None else index), rows

    def parts(self) -> list[journal.Part]:
        """Durable parts of the run.

        Raises:
            RunDirectoryError: the journal is damaged, or lacks parts that the manifest of a closed run lists.
        """
        parts = journal.read(self.path)
        listed = self.manifest.get("files")
        if listed is not None and (lost := listed.keys() - {f for part in parts for f in part.files}):
            where = self.path / journal.NAME
            if not where.exists():
                raise RunDirectoryError(f"{where} is missing, and the manifest lists files of it", fix=FIX)
            raise RunDirectoryError(f"{where} does not name {min(lost)}, which the manifest lists", fix=FIX)
        return parts

    def row_count(self) -> int:
        """Row numbers that were given out, one for every computed position. A hook point holds all of these rows, or
        those that were selected."""
        return sum(p.rows for p in self.parts())

    def recorded_files(self) -> dict[str, str]:
        """SHA-256 of every file that the journal names, by its path in the run directory."""
        return {name: digest for part in self.parts() for name, digest in part.files.items()}

    def facts(self) -> dict[str, int]:
        """Rows of each table of the ledger, and how many positions were rebound. For the manifest of a closed run."""
        counts = dict.fromkeys(("spans", "forwards", "rebinds", "requests"), 0)
        for file in (f for part in self.parts() for f in part.files):
            folder, _, name = file.partition("/")
            if folder == "ledger" and (table := name.split("-")[0]) in counts:
                with reading(self.path / file):
                    counts[table] += pq.ParquetFile(self.path / file).metadata.num_rows
        rebinds = self.rebinds()
        return {**counts, "rebound_positions": int((rebinds["end"] - rebinds["start"]).sum())}

    def _table(self, name: str, table_schema: pa.Schema) -> pd.DataFrame:
        prefix = name if "/" in name else f"ledger/{name}-"
        files = [(part, f) for part in self.parts() for f in part.files if f.startswith(prefix)]
        kinds = {"never_null": schema.NEVER_NULL[name], "added": schema.ADDED.get(name, ())}
        tables = [read_table(self.path / f, table_schema, **kinds) for _, f in files]
        frame = (pa.concat_tables(tables) if tables else table_schema.empty_table()).to_pandas()
        ranks = np.array([part.dp_rank for part, _ in files], dtype=np.int16)
        frame.insert(0, "dp_rank", np.repeat(ranks, [len(t) for t in tables]))
        return frame

    def _requests_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Older runs lack columns that came later; those that the engine's own table has are always there.

        Args:
            columns: what is read beside the finish reason, null where it is lacking; None: everything that is there.
        """
        path = self.path / REQUESTS_FILE
        if not path.exists():
            if "segment" in self.manifest:
                raise RunDirectoryError(
                    f"{path} is missing: the segment is being recorded, or its server died",
                    fix="POST /probe/flush closes it; starting a server on the directory closes what a dead one left",
                )
            raise RunDirectoryError(f"{path} is missing: the run was interrupted", fix="finish it with --resume")
        with reading(path):
            file = pq.ParquetFile(path)
            always = [*schema.ENGINE_REQUESTS.names, "index", "prompt_ids", "segments", "sampling_params"]
            require_columns(path, file.schema_arrow, always)
            present = file.schema_arrow.names
            asked = present if columns is None else [*dict.fromkeys([*columns, "finish_reason"])]
            always = [name for name in always if name in asked]
            table = file.read(columns=[name for name in asked if name in present])
            for name in (n for n in asked if n not in present):
                table = table.append_column(name, pa.nulls(len(table), schema.REQUESTS.field(name).type))
            for name in always:
                kind = schema.REQUESTS.field(name).type
                if name != "segments":
                    table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
                if name in schema.REQUESTS_NEVER_NULL and table[name].null_count:
                    raise RunDirectoryError(f"{path} is damaged: `{name}` has no value in some row", fix=FIX)
            return table

    def _holds_any(self, hook_point: str) -> bool:
        return any(f.startswith(f"rows/{hook_point}/") for part in self.parts() for f in part.files)

    def shards_of(self, hook_point: str) -> list[tuple[int, int, Path]]:
        """First row number, end and file of each shard of a hook point, ascending by rank and number.

        Raises:
            RunDirectoryError: it was not captured.
        """
        found = []
        for part in self.parts():
            name = f"rows/{hook_point}/shard-{part.stem}.safetensors"
            if name in part.files:
                found.append((part.rows_end - part.rows, part.rows_end, self.path / name))
        if not found:
            raise RunDirectoryError(
                f"{self.path} has no rows of `{hook_point}`",
                fix=f"captured hook points: {', '.join(self.hook_points) or 'none'}",
            )
        return found
