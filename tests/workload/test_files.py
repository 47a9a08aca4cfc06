"""Files are told by their content: read as records, or named for what they are."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sglang_probe.errors import WorkloadError
from sglang_probe.workload.files import records_in
from sglang_probe.workload.jsonl import Jsonl
from sglang_probe.workload.sources import SourceReport

RECORDS = [{"prompt": "a"}, {"prompt": "ß"}]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS)
LIST = json.dumps(RECORDS, ensure_ascii=False, indent=1)


def prompts(path: Path) -> list[str]:
    return [c.segments[0].text for c in Jsonl(path=path).conversations(SourceReport())]


@pytest.mark.parametrize("text", [LINES, LIST, LINES.replace("\n", "\r\n\r\n"), LIST.replace("\n", " ")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_lines_and_lists_in_any_encoding_of_json(tmp_path: Path, text: str, encoding: str) -> None:
    path = tmp_path / "any.bin"
    path.write_bytes(text.encode(encoding))
    assert prompts(path) == ["a", "ß"]


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress, lambda d: pa.Codec("zstd").compress(d).to_pybytes()]
)
@pytest.mark.parametrize("text", [LINES, LIST])
def test_compressed_files_whatever_they_are_called(tmp_path: Path, pack: Any, text: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(pack(text.encode()))
    assert prompts(path) == ["a", "ß"]


def test_one_object_over_several_lines_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"prompt": "a"}, indent=2))
    assert prompts(path) == ["a"]


def test_parquet_is_read_by_rows_and_what_is_null_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "data"
    message = {"role": "user", "content": "hi", "name": None}
    pq.write_table(pa.Table.from_pylist([{"messages": [message], "prompt": None}, {"prompt": "b"}]), path)
    chat, plain = Jsonl(path=path).conversations(SourceReport())
    assert (chat.segments[0].text, chat.segments[0].role) == ("hi", "user")
    assert (plain.segments[0].text, plain.source) == ("b", f"{path}: row 2")


def test_ids_in_parquet_are_served_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"input_ids": pa.array([[5, 6, 7], [8]], pa.list_(pa.int32()))}), path)
    found = [c.rendered.prompt_ids for c in Jsonl(path=path).conversations(SourceReport()) if c.rendered]
    assert found == [(5, 6, 7), (8,)]


def packed_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(LINES.encode())
        tar.addfile(info, io.BytesIO(LINES.encode()))
    return out.getvalue()


def packed_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jsonl", LINES)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "is empty"),
        (b"\n  \n", "holds white space alone"),
        (b"[]", "is an empty list"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"\xef\xbb\xbf<html>", "a web page"),
        (packed_zip(), "a zip archive"),
        (packed_tar(), "a tar archive"),
        (gzip.compress(packed_tar()), "a tar archive (in gzip)"),
        (gzip.compress(b""), "is empty (in gzip)"),
        (pickle.dumps(RECORDS), "a Python pickle"),
        (b"\x93NUMPY\x01", "a NumPy array"),
        (b"SQLite format 3\x00", "an SQLite database"),
        (gzip.compress(LINES.encode() * 999)[:60], "cannot read"),
        (b"PAR1 and no more", "cannot read"),
        (b'[{"prompt": "a"},\n{"prompt":', "begins like a JSON list and is none"),
    ],
    ids=lambda of: of if isinstance(of, str) else "",  # archives hold the time: two workers would name them otherwise
)
def test_what_is_no_file_of_records_is_named(tmp_path: Path, data: bytes, named: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    with pytest.raises(WorkloadError) as e:
        list(records_in(path))
    assert named in str(e.value)
    assert str(path) in str(e.value)


def test_a_folder_is_named_with_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").touch()
    with pytest.raises(WorkloadError, match=r"is a folder \(in it: train\.parquet\)"):
        list(records_in(tmp_path))
