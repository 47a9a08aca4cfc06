"""What sources have in common: the report they fill in, and the reading of files with one record after another.

A source is a config with a method `conversations(report)`. It yields lazily and always in the same order.

**A record that cannot be used** is one whatever the reason: no JSON, an unknown key, a bad value, a template that
refuses it, too long a prompt, sampling values that SGLang refuses, an ask that cannot be had. `SourceReport.refuse` is
the one place that decides what becomes of it: with `skip_bad` it is counted by reason, else it ends the run and is
named by file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field

from sglang_probe.config import BAD_VALUE, Config, InputPath, parse_config
from sglang_probe.errors import ConfigError, ProbeError, WorkloadError
from sglang_probe.workload.files import Raw, parse_json, records_in
from sglang_probe.workload.rendering import Rendering

_MESSAGE_LIMIT = 400

HARMLESS = frozenset(
    {"id", "custom_id", "uuid", "idx", "index", "conversation_id", "chat_id", "hash", "model", "model_name", "source"}
    | {"dataset", "split", "language", "lang", "category", "topic", "task", "tags", "title", "score", "timestamp"}
    | {"created", "created_at", "metadata", "user", "store"}
)
"""Keys of a record that reach no prompt anywhere, and are ignored. All others that a source does not read are
refused, because a key that changes the prompt elsewhere must not be dropped unnoticed."""
HARMLESS_IN_MESSAGE = frozenset({"id", "weight", "timestamp", "created_at"})
"""Those of a message."""
_SAYS_NOTHING: tuple[Any, ...] = ("", "[]", [], {})

TOOLS = "tools are not supported: a prompt with tools is what the model's template makes of them; render it, and give"
TOOLS += " `prompt_ids`"

PASS_OVER = "set `skip_bad: true` (`--skip-bad`) to pass over bad records and count them"


@dataclass
class SourceReport:
    """What is learnt of a source while it is read. Final once its requests are made."""

    skip_bad: bool = False
    reasons: dict[str, int] = field(default_factory=dict)
    """Records, or requests of one, that were passed over, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first of each reason, with its place."""
    corpus_digest: str | None = None
    """Digest of the corpus the text was drawn from."""

    @property
    def skipped(self) -> int:
        """How many were passed over."""
        return sum(self.reasons.values())

    def refuse(self, where: str, error: ProbeError, *, from_file: bool = True) -> None:
        """Count a record that cannot be used, or end the run.

        Args:
            where: file and line.
            from_file: `skip_bad` has a meaning.

        Raises:
            ProbeError: of the kind of `error`, with its place; unless `skip_bad` is set.
        """
        said = error.message if error.message.startswith(where) else f"{where}: {error.message}"
        if len(said) > _MESSAGE_LIMIT + len(where):  # it quotes a value, which may be a whole document
            said = said[: _MESSAGE_LIMIT + len(where)] + "…"
        if not self.skip_bad:
            fix = f"{error.fix}; or {PASS_OVER}" if error.fix else f"correct it, or {PASS_OVER}"
            raise type(error)(said, fix=fix if from_file else error.fix, reason=error.reason) from error
        reason = error.reason or BAD_VALUE
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.examples.setdefault(reason, said)


def in_words(reasons: Mapping[str, int]) -> str:
    """Reasons with their counts, the most frequent first: `3 too long, 1 template`."""
    return ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items(), key=lambda x: -x[1]))


@contextmanager
def because(reason: str, *, whatever: bool = False) -> Iterator[None]:
    """Refusals raised within are of this reason, unless they have one; `whatever` they have."""
    try:
        yield
    except ProbeError as e:
        e.reason = reason if whatever else e.reason or reason
        raise


class FileSource(Rendering):
    """A source that reads a file of records."""

    path: InputPath
    """JSON Lines, a JSON list or Parquet; also compressed (gzip, zstd, bzip2, xz). Relative to the YAML file."""
    limit: int | None = Field(default=None, ge=1)
    """Stop after this many requests."""
    skip_bad: bool = False
    """Pass over records that cannot be used, for whatever reason, and count them, instead of ending the run."""
    ignore_keys: frozenset[str] = frozenset()
    """Further keys of records and messages that reach no prompt, and are ignored."""


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"lone surrogate at character {e.start}: not a character, it has no tokens") from e
    return text


Text = Annotated[str, AfterValidator(_encodable)]
"""A string that can be tokenized. JSON can spell lone surrogates (`\\ud800`); UTF-8 and tokenizers cannot."""

M = TypeVar("M", bound=Config)
T = TypeVar("T")


def read_records(source: FileSource, model: type[M], report: SourceReport, use: Callable[[M, Raw], T]) -> Iterator[T]:
    """What `use` makes of each record of a file, read as `model`. `report` gets the bad ones.

    Raises:
        WorkloadError: the file cannot be read, or a record is bad and `skip_bad` is off.
    """
    report.skip_bad = source.skip_bad
    known = _known(model)
    if read := sorted(known & source.ignore_keys):
        raise WorkloadError(f"`ignore_keys: {read[0]}`: this source reads it", fix="leave it out of `ignore_keys`")
    for raw in records_in(source.path):
        try:
            made = use(_parse(raw, model, known, source.ignore_keys), raw)
        except ProbeError as e:
            report.refuse(raw.where, e)
        else:
            yield made


def _parse(raw: Raw, model: type[M], known: Collection[str], ignored: frozenset[str]) -> M:
    data = raw.data
    if isinstance(data, bytes | str):
        try:
            data = parse_json(data)
        except (ValueError, RecursionError) as e:
            raise WorkloadError(f"{raw.where}: not valid JSON: {e}", reason="not JSON") from e
    if not isinstance(data, dict):
        said = f"{raw.where}: expected a JSON object, found {type(data).__name__}"
        raise WorkloadError(said, reason="not a JSON object")
    try:
        return parse_config(_heard(data, known, ignored), model, where=raw.where)
    except ConfigError as e:
        raise WorkloadError(e.message, reason=e.reason) from None


def _known(model: type[Config]) -> set[str]:
    """Keys of a record that are read."""
    return {f.alias or name for name, f in model.model_fields.items()}.union(getattr(model, "synonyms", ()))


def _heard(data: Mapping[str, Any], known: Collection[str], ignored: frozenset[str]) -> dict[str, Any]:
    """A record without what says nothing: harmless keys, and keys unknown here whose value is null or empty."""
    harmless = HARMLESS | ignored

    def heard(k: str, v: Any) -> bool:
        if v is None:
            return False
        return k in known or not (k in harmless or any(type(v) is type(x) and v == x for x in _SAYS_NOTHING))

    inner = HARMLESS_IN_MESSAGE | ignored
    return {k: _heard_messages(v, inner) for k, v in data.items() if heard(str(k), v)}


def _heard_messages(value: Any, harmless: Collection[str]) -> Any:
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        return value
    empty = {"content", "value"}
    return [
        {k: v for k, v in m.items() if k in empty or not (k in harmless or v is None or v == [] or v == {})}
        for m in value
    ]
