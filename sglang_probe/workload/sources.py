"""What sources have in common: the report they fill in, and the reading of files with one record after another.

A source is a config with a method `conversations(report)`. It yields lazily and always in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field

from sglang_probe.config import Config, parse_config
from sglang_probe.errors import ConfigError, WorkloadError

_MESSAGE_LIMIT = 400


@dataclass
class SourceReport:
    """What a source learns while it is read. Final once its conversations are exhausted."""

    skipped: int = 0
    """Bad records that `skip_bad` passed over."""
    corpus_digest: str | None = None
    """Digest of the corpus the text was drawn from."""


class FileSource(Config):
    """A source that reads a file of records."""

    path: Path
    """File to read."""
    limit: int | None = Field(default=None, ge=1)
    """Stop after this many requests."""
    skip_bad: bool = False
    """Pass over records that cannot be used, and count them, instead of refusing the file."""


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"lone surrogate at character {e.start}: not a character, it has no tokens") from e
    return text


Text = Annotated[str, AfterValidator(_encodable)]
"""A string that can be tokenized. JSON can spell lone surrogates (`\\ud800`); UTF-8 and tokenizers cannot."""

M = TypeVar("M", bound=Config)


def read_lines(source: FileSource, model: type[M], report: SourceReport) -> Iterator[tuple[int, M]]:
    """Each line of a JSONL file as `model`, with its number from 1. Blank lines are no records.

    Raises:
        WorkloadError: the file cannot be read, or a line is bad and `skip_bad` is off.
    """
    lines = enumerate(_read(source.path).split(b"\n"), start=1)
    return _parsed(((n, line) for n, line in lines if line.strip()), f"{source.path}:", model, source.skip_bad, report)


def read_list_or_lines(source: FileSource, model: type[M], report: SourceReport) -> Iterator[tuple[int, M]]:
    """As `read_lines`, but the file may also be one JSON list, whose elements are numbered from 1."""
    data = _read(source.path)
    if not data.lstrip().startswith(b"["):
        return read_lines(source, model, report)
    records = enumerate(_decode(data, str(source.path)), start=1)
    return _parsed(records, f"{source.path}: record ", model, source.skip_bad, report)


def _read(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as e:
        raise WorkloadError(f"cannot read {path}: {e.strerror}", fix="give the path of a JSON or JSONL file") from e


def _parsed(
    records: Iterable[tuple[int, Any]], place: str, model: type[M], skip_bad: bool, report: SourceReport
) -> Iterator[tuple[int, M]]:
    for number, record in records:
        try:
            parsed = _parse(record, model, f"{place}{number}")
        except WorkloadError:
            if not skip_bad:
                raise
            report.skipped += 1
        else:
            yield number, parsed


def _parse(record: Any, model: type[M], where: str) -> M:
    data = _decode(record, where) if isinstance(record, bytes) else record
    if not isinstance(data, dict):
        raise WorkloadError(f"{where}: expected a JSON object, found {type(data).__name__}", fix=SKIP_BAD)
    try:
        return parse_config(data, model, where=where)
    except ConfigError as e:
        # The message quotes the value, which may be a whole document.
        short = e.message if len(e.message) <= _MESSAGE_LIMIT else e.message[:_MESSAGE_LIMIT] + "…"
        raise WorkloadError(short, fix=SKIP_BAD) from None


def _decode(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise WorkloadError(f"{where}: not valid JSON: {e}", fix=SKIP_BAD) from e


SKIP_BAD = "correct it, or set `skip_bad: true` to pass over bad records and count them"
