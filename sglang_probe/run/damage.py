"""Files of a run directory that cannot be read: one sentence that names the file, in place of a library's traceback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sglang_probe.errors import ProbeError, RunDirectoryError

FIX = "`sglang-probe verify` says what else is wrong; restore the file from a copy, or record the run again"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is said of `path`.

    Raises:
        RunDirectoryError: the file is missing, is no file, or does not hold what it should.
    """
    try:
        yield
    except ProbeError:
        raise
    except FileNotFoundError as e:
        raise RunDirectoryError(f"{path} is missing", fix=FIX) from e
    except PermissionError as e:
        raise RunDirectoryError(f"{path} cannot be read: permission denied", fix="ask its owner for it") from e
    except Exception as e:  # safetensors' own error has no public base, and Arrow's are of several kinds
        what = "it is a directory" if path.is_dir() else _first_line(e)
        raise RunDirectoryError(f"{path} is damaged: {what}", fix=FIX) from e


def read_table(path: Path, schema: pa.Schema, *, never_null: Sequence[str] = (), added: Sequence[str] = ()) -> pa.Table:
    """A Parquet file with exactly the columns of `schema`.

    Args:
        never_null: columns that have a value in every row.
        added: columns that runs of earlier releases do not have; they are null then.

    Raises:
        RunDirectoryError: it cannot be read, a column is missing or of another type, or a value is null.
    """
    with reading(path):
        file = pq.ParquetFile(path)
        absent = [name for name in added if name not in file.schema_arrow.names]
        present = [name for name in schema.names if name not in absent]
        require_columns(path, file.schema_arrow, present)
        table = file.read(columns=present)
        for name in absent:
            table = table.append_column(schema.field(name), pa.nulls(len(table), schema.field(name).type))
        table = table.select(schema.names)
        for name in never_null:
            if table[name].null_count:
                row = pc.index(pc.is_null(table[name]), value=pa.scalar(True)).as_py()
                raise RunDirectoryError(f"{path} is damaged: `{name}` has no value in row {row}", fix=FIX)
        return table.cast(schema)


def require_columns(path: Path, present: pa.Schema, names: Sequence[str]) -> None:
    """Refuse a table without some of its columns.

    Raises:
        RunDirectoryError: names them.
    """
    if missing := [name for name in names if name not in present.names]:
        raise RunDirectoryError(
            f"{path} is damaged: it has no column {', '.join(f'`{name}`' for name in missing)}", fix=FIX
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
