"""Files of records: JSON Lines, a JSON list, Parquet, each perhaps compressed; told by their content, not their name.

Everything else that people give by mistake (a Git LFS pointer, a web page, an archive) is recognised and named.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sglang_probe.errors import WorkloadError

_HEAD = 4096
_BATCH = 256
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
_PARQUET = b"PAR1"
_NOT_RECORDS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file that it stands for", "fetch it: `git lfs pull`"),
    b"/annex/objects/": ("a git-annex pointer, not the file that it stands for", "fetch it: `git annex get`"),
    b"PK\x03\x04": ("a zip archive", "unpack it, and give one of its files"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it, and give one of its files"),
    b"ARROW1": ("an Arrow file", "write it as Parquet or JSON Lines"),
    b"\xff\xff\xff\xff": ("an Arrow stream (a data set's cache)", "write it as Parquet or JSON Lines"),
    b"\x89HDF": ("an HDF5 file", "write it as Parquet or JSON Lines"),
    b"\x93NUMPY": ("a NumPy array", 'write it as JSON Lines: {"prompt_ids": [...]}'),
    b"SQLite format 3": ("an SQLite database", "write it as Parquet or JSON Lines"),
    b"%PDF": ("a PDF", "give JSON Lines"),
    b"\xd0\xcf\x11\xe0": ("an old Office document", "write it as JSON Lines"),
    b"GGUF": ("the weights of a model (GGUF)", "give JSON Lines"),
}
"""What begins with these bytes, and what to do."""
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")


class Raw(NamedTuple):
    """One record as the file has it."""

    number: int
    """Its line, row or place in the list, from 1."""
    where: str
    """For messages: `file.jsonl:17`, `file.json: record 2`, `file.parquet: row 5`."""
    data: Any
    """Bytes or text of a line; or what was parsed."""


def records_in(path: Path) -> Iterator[Raw]:
    """The records of a file, lazily. Blank lines are none.

    Raises:
        WorkloadError: the file cannot be read, or is something else; says what.
    """
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.is_file())[:3]
        named = f" (in it: {', '.join(inside)})" if inside else ""
        raise WorkloadError(f"{path} is a folder{named}", fix="give one file")
    try:
        with path.open("rb") as file:
            yield from _records(path, file, ())
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as e:
        said = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise WorkloadError(
            f"cannot read {path}: {said}",
            fix="give the path of a JSON, JSON Lines or Parquet file; in a YAML file it is relative to that file",
        ) from e
    except UnicodeDecodeError as e:
        raise WorkloadError(f"cannot read {path}: it is no {e.encoding}: {e.reason}", fix="write it as UTF-8") from e


def parse_json(data: bytes | str) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        ValueError, RecursionError: it is none, or a key is there twice, one of which would be dropped.
    """
    return json.loads(data.decode("utf-8") if isinstance(data, bytes) else data, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key `{next(n for n in names if names.count(n) > 1)}` is there twice")
    return found


def _records(path: Path, file: Any, within: tuple[str, ...]) -> Iterator[Raw]:
    stream = io.BufferedReader(file) if not isinstance(file, io.BufferedReader) else file
    head = stream.peek(_HEAD)[:_HEAD]
    inside = f" (in {', in '.join(within)})" if within else ""
    if not head:
        raise WorkloadError(f"{path} is empty{inside}", fix="give a file that holds records")
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            yield from _records(path, _decompressed(stream, kind), (kind, *within))
            return
    if head.startswith(_PARQUET):
        if within:
            raise WorkloadError(f"{path} is Parquet{inside}", fix="decompress it; Parquet is compressed within")
        yield from _rows(path)
        return
    _refuse(path, head, inside)
    yield from _json(path, stream, head)


def _decompressed(stream: io.BufferedReader, kind: str) -> Any:
    if kind == "zstd":
        import pyarrow as pa

        return pa.CompressedInputStream(stream, "zstd")
    if kind == "gzip":
        return gzip.open(stream)
    return bz2.open(stream) if kind == "bzip2" else lzma.open(stream)


def _refuse(path: Path, head: bytes, inside: str) -> None:
    found = next((what for magic, what in _NOT_RECORDS.items() if head.startswith(magic)), None)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        found = ("a Python pickle, which can run code when it is read", "write it as JSON Lines")
    elif head[257:262] == b"ustar":
        found = ("a tar archive", "unpack it, and give one of its files")
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        found = ("a web page (HTML), perhaps of a login or an error", "download the file itself")
    if found is not None:
        what, fix = found
        raise WorkloadError(f"{path} is {what}{inside}", fix=fix)


def _json(path: Path, stream: io.BufferedReader, head: bytes) -> Iterator[Raw]:
    lines: Iterator[Any] = stream
    encoding = json.detect_encoding(head)
    if encoding == "utf-8-sig":
        stream.read(3)
    elif encoding != "utf-8":
        lines = io.TextIOWrapper(stream, encoding=encoding, newline="\n")
    numbered: Iterator[tuple[int, Any]] = ((n, line) for n, line in enumerate(lines, start=1) if line.strip())
    first = next(numbered, None)
    if first is None:
        raise WorkloadError(f"{path} holds white space alone", fix="give a file that holds records")
    is_list = first[1].lstrip()[:1] in (b"[", "[")
    if is_list or not _parses(first[1]):
        # A list, or one object over several lines; or lines, of which the first is none.
        rest = list(numbered)
        whole = (b"" if isinstance(first[1], bytes) else "").join(line for _, line in [first, *rest])
        try:
            found = parse_json(whole)
        except (ValueError, RecursionError) as e:
            if is_list and not _parses(first[1]):
                raise WorkloadError(f"{path} begins like a JSON list and is none: {e}", fix="repair the file") from e
        else:
            listed = found if isinstance(found, list) else [found]
            if not listed:
                raise WorkloadError(f"{path} is an empty list", fix="give a file that holds records")
            yield from (Raw(n, f"{path}: record {n}", item) for n, item in enumerate(listed, start=1))
            return
        numbered = iter(rest)
    yield from (Raw(n, f"{path}:{n}", line) for n, line in chain([first], numbered))


def _parses(line: Any) -> bool:
    try:
        parse_json(line)
    except (ValueError, RecursionError):
        return False
    return True


def _rows(path: Path) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                raise WorkloadError(f"{path} has no rows", fix="give a file that holds records")
            batches = file.iter_batches(batch_size=_BATCH)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from (Raw(n, f"{path}: row {n}", _without_nulls(row)) for n, row in enumerate(rows, start=1))
    except pa.ArrowException as e:
        raise WorkloadError(f"cannot read {path} as Parquet: {e}", fix="write it again, or give JSON Lines") from e


def _without_nulls(value: Any) -> Any:
    """A column that says nothing of a row, or a field of a struct that other rows have, is null there."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
