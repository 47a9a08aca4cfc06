"""Changes of a good run, hundreds of them, and which of them `verify` notices.

    python -m tests.verify.mutations --out docs/evidence/verify.md

A *crude* change leaves hashes as they are, as damage and carelessness do. A *consistent* one writes every hash anew,
the journal's, the manifest's and the seal's (`tests.amended.amend`), as a fault in one of the writers would: then only
what the run says in two places can give it away.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sglang_probe.errors import ProbeError
from sglang_probe.run import seal
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify
from tests.amended import amend
from tests.verify.good_run import make_good_run

_ONCE = "written in this one place, and nothing of the data follows from it"
_MODEL = (
    "which of a hook point's rows is whose, or whether they are the model's, only the model can tell (--transformers)"
)
_PUBLISHED = "of a publication of which nobody reused anything later"
UNDECIDED = {
    "cells forwards.launched*": "nothing else has the time of one forward pass; order is asked, to a second",
    "cells forwards.seconds*": "how long one forward pass took is nowhere else; order and sum are asked, to a second",
    "cells forwards.waiting*": "the length of the queue is written nowhere else",
    "cells forwards.graph*": "whether a graph was replayed is written nowhere else",
    "cells rebinds.at_forward*: +1*": "when the cache took a request's entries is not in the ledger",
    "cells tree.at_forward*: +1*": "when the tree took entries that nobody used at once is written nowhere else",
    "cells tree.sliding*": "which pools the cache has is written nowhere else",
    "cells tree.order*: +1*": "numbers are left out where the tree was asked again for a request that waited",
    "cells tree.rid*": _PUBLISHED,
    "cells tree.attempt*: null*": _PUBLISHED,
    "cells tree.start*": _PUBLISHED,
    "cells tree.end*: -1*": _PUBLISHED,
    "cells tree.* row *: deleted*": _PUBLISHED,
    "cells tree.* row 0: doubled*": "a recording that begins twice with nothing between",
    "cells telemetry.*": "the numbers of one step are written once; ranges and sums are asked",
    "rows rows hook_resid_post: *swap*": _MODEL,
    "rows rows hook_v: *swap*": _MODEL,
    "rows rows hook_resid_post: negate": _MODEL,
    "rows rows hook_v: negate": _MODEL,
    "files rows/blocks.*: another run's": _MODEL,
    "files README.md: another run's": "words for people, which no study reads; the numbers in them are in the manifest",
    "files ledger/forwards-*: another run's": "two runs of the same batches differ in their times alone",
    "cells forwards.mode*: another (mixed)*": "a mixed forward pass may have nothing to decode",
    "cells embedding.hash*": "of a token that has no captured row; of any other it is noticed",
    "manifest rows_kept: *": "of what selects the same rows",
    "manifest switches: *": "a switch that is not named is as SGLang has it, and the policy says the same",
    "manifest privacy: other": _ONCE,
    "manifest model: context_length +1": _ONCE,
    "manifest model: without tokenizer_sha256": _ONCE,
    "cells *: first and last row exchanged*": "the order of the rows of a part says nothing",
    "manifest created: *": _ONCE,
    "manifest python: *": _ONCE,
    "manifest inventory: version +1": _ONCE,
    "manifest machine: *": _ONCE,
    "manifest arm: *": _ONCE,
    "manifest name: *": _ONCE,
    "manifest model_path: *": _ONCE,
    "manifest corpus_digest: *": _ONCE,
    "manifest sampling: *": "requests may overrule it; what each was asked is in requests.parquet, under a digest",
    "manifest concurrency: [+-]1": "a bound that need not be reached",
    "manifest submission_order: *": "when each request was submitted is not in the ledger",
    "manifest lines_skipped: +1": _ONCE,
    "manifest server_resolved: *": _ONCE,
    "manifest server_given: *": _ONCE,
    "manifest workload: *": "prompts are under a digest; what they were made from is written once",
    "manifest workload_digest: another run's": "it covers what requests asked of the probe, which is not kept whole",
    "manifest model_config: *": "the width is asked of the rows; without it, that all of one kind have one width",
    "manifest telemetry: sinks +1": "what the numbers of a step depend on is written once",
    "manifest telemetry: window +1": "what the numbers of a step depend on is written once",
    "manifest telemetry: memory +1": "what the numbers of a step depend on is written once",
}
"""Consistent changes that `verify` does not notice, by pattern, and why."""


@dataclass(frozen=True)
class Mutation:
    """A change of the run in a folder. `name` says where and what; `kind` groups it in the table."""

    kind: str
    name: str
    apply: Callable[[Path], None]
    consistent: bool


def mutations(run: Path, other: Path) -> Iterator[Mutation]:
    """All of them, for a good run and another good run of other tokens and weights."""
    yield from _of_files(run, other)
    for file in sorted([*run.glob("ledger/*.parquet"), *run.glob("telemetry/*.parquet"), *run.glob("*.parquet")]):
        yield from _of_table(run, file.relative_to(run).as_posix())
    yield from _of_manifest(run, other)
    yield from _of_rows(run)
    yield from _of_journal(run)


# ------------------------------------------------------------------ files


def _of_files(run: Path, other: Path) -> Iterator[Mutation]:
    files = sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())

    def crude(what: str, file: str, change: Callable[[Path], None]) -> Mutation:
        return Mutation("files", f"{file}: {what}", lambda path: change(path / file), False)

    for file in files:
        yield crude("deleted", file, Path.unlink)
        yield crude("emptied", file, lambda p: p.write_bytes(b""))
        yield crude("cut in half", file, lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]))
        yield crude("one bit flipped", file, _flip)
        yield crude("garbage", file, lambda p: p.write_bytes(b"\x00garbage\xff" * 9))
        yield crude("a directory in its place", file, _directory)
        if (other / file).is_file() and (other / file).read_bytes() != (run / file).read_bytes():
            yield Mutation("files", f"{file}: another run's", lambda p, f=file: _take(p, other, f), False)
            if file not in (MANIFEST, seal.NAME, "journal.jsonl"):
                yield Mutation("files", f"{file}: another run's", lambda p, f=file: _take(p, other, f), True)
    for name in ("ledger/spans-00099.parquet", "rows/hook_embed/shard-00099.safetensors", "kept.2.safetensors"):
        source = files[0] if name.startswith("kept") else next(f for f in files if f.startswith(name[:9]))
        yield Mutation("files", f"{name}: one more", lambda p, n=name, s=source: _more(p, s, n), False)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _take(path: Path, other: Path, file: str) -> None:
    shutil.copy(other / file, path / file)


def _more(path: Path, source: str, name: str) -> None:
    shutil.copy(path / source, path / name)


# ------------------------------------------------------------------ tables


def _of_table(run: Path, file: str) -> Iterator[Mutation]:
    table = pq.read_table(run / file)
    label = "telemetry" if file.startswith("telemetry") else Path(file).stem.split("-")[0]
    label, part = ("engine", file[-9]) if file.startswith("ledger/requests") else (label, file[-9])
    where = f" (part {part})" if part.isdigit() else ""
    rows = sorted({0, len(table) // 2, len(table) - 1})

    def change(what: str, how: Callable[[list[dict[str, Any]]], None]) -> Mutation:
        return Mutation("cells", f"{label}.{what}{where}", lambda path: _rewrite(path / file, how), True)

    for column in table.column_names:
        values = table[column].to_pylist()
        for row in rows:
            for said, value in _changed(values, row):
                yield change(f"{column} row {row}: {said}", lambda x, r=row, c=column, v=value: x[r].update({c: v}))
    for row in rows:
        yield change(f"* row {row}: deleted", lambda x, r=row: x.pop(r))
        yield change(f"* row {row}: doubled", lambda x, r=row: x.insert(r, copy.deepcopy(x[r])))
    if len(table) > 1:
        yield change("*: first and last row exchanged", _exchange)
        for column in table.column_names:
            values = table[column].to_pylist()
            if values[0] != values[-1]:
                yield change(f"{column}: first and last exchanged", lambda x, c=column: _exchange_cells(x, c))
    yield change("*: all rows deleted", list.clear)


def _changed(values: list[Any], row: int) -> Iterator[tuple[str, Any]]:
    """Other values that the cell of a column could hold."""
    value = values[row]
    if value is not None:
        yield "null", None
    if isinstance(value, bool):
        yield "not", not value
    elif isinstance(value, int | float):
        yield "+1", value + 1
        yield "-1", value - 1
        if value > 2:
            yield "0", type(value)(0)
    elif isinstance(value, str) or (value is None and any(isinstance(v, str) for v in values)):
        others = sorted({v for v in values if v not in (None, value)})
        yield from ((f"another ({v})", v) for v in others[:3])
        yield "unknown", "unknown"
    elif isinstance(value, list) and value:
        yield "first dropped", value[1:]
        yield "last doubled", [*value, value[-1]]
        first = value[0]
        if isinstance(first, int | float):
            yield "first +1", [first + 1, *value[1:]]
        elif isinstance(first, dict):
            for key, x in first.items():
                yield f"first {key}", [{**first, key: x + 1 if isinstance(x, int) else "unknown"}, *value[1:]]


def _rewrite(file: Path, how: Callable[[list[dict[str, Any]]], None]) -> None:
    table = pq.read_table(file)
    records = table.to_pylist()
    how(records)
    pq.write_table(pa.Table.from_pylist(records, schema=table.schema), file)


def _exchange(records: list[dict[str, Any]]) -> None:
    records[0], records[-1] = records[-1], records[0]


def _exchange_cells(records: list[dict[str, Any]], column: str) -> None:
    records[0][column], records[-1][column] = records[-1][column], records[0][column]


# ------------------------------------------------------------------ manifest


def _of_manifest(run: Path, other: Path) -> Iterator[Mutation]:
    manifest = json.loads((run / MANIFEST).read_text())
    theirs = json.loads((other / MANIFEST).read_text())
    for key, value in manifest.items():
        if key == "files":
            continue
        options: list[tuple[str, Any]] = [("deleted", _DELETE)]
        other_value = theirs.get(key) != value and key != "kept"  # whose hash is written anew, and nothing else differs
        options += [("another run's", theirs[key])] if other_value else []
        options += list(_other_fields(value))
        for said, v in options:
            yield Mutation("manifest", f"{key}: {said}", lambda p, k=key, v=v: _set(p, k, v), False)
            yield Mutation("manifest", f"{key}: {said}", lambda p, k=key, v=v: _set(p, k, v), True)


_DELETE = object()


def _other_fields(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool) or value is None:
        yield "set", {"a": 1}
    elif isinstance(value, int):
        yield from (("+1", value + 1), ("-1", value - 1), ("a string", "x"))
    elif isinstance(value, str):
        yield from (("other", "other"), ("a number", 1))
    elif isinstance(value, list):
        yield "emptied" if value else "filled", [] if value else [9]
    elif isinstance(value, dict):
        yield "a list", [1]
        for key, x in value.items():
            yield f"without {key}", {k: y for k, y in value.items() if k != key}
            if isinstance(x, int) and not isinstance(x, bool):
                yield f"{key} +1", {**value, key: x + 1}


def _set(path: Path, key: str, value: Any) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    if value is _DELETE:
        del manifest[key]
    else:
        manifest[key] = value
    (path / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


# ------------------------------------------------------------------ rows and journal


def _of_rows(run: Path) -> Iterator[Mutation]:
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "first two swapped": lambda x: x[[1, 0, *range(2, len(x))]],
        "first and last swapped": lambda x: x[[len(x) - 1, *range(1, len(x) - 1), 0]],
        "shifted by one, swap of all": lambda x: x.roll(1, 0),
        "negate": lambda x: -x,
        "one zero": lambda x: torch.cat([x[:-1], torch.zeros_like(x[:1])]),
        "one not a number": lambda x: torch.cat([x[:-1], x[:1] * float("nan")]),
        "one infinite": lambda x: torch.cat([x[:-1], x[:1] * float("inf")]),
        "one that of another token": lambda x: torch.cat([x[:-1], x[:1]]),
        "last dropped": lambda x: x[:-1],
        "last doubled": lambda x: torch.cat([x, x[-1:]]),
        "one column less": lambda x: x[:, :-1],
        "another shape": lambda x: x.flatten(),
        "another dtype": lambda x: x.float(),
        "half precision": lambda x: x.half(),
    }
    for file in sorted(p.relative_to(run).as_posix() for p in run.glob("rows/*/*-00000.safetensors")):
        point = file.split("/")[1].rsplit(".", 1)[-1]
        for said, way in ways.items():
            yield Mutation("rows", f"rows {point}: {said}", lambda p, f=file, w=way: _rows(p / f, w), True)
        yield Mutation("rows", f"rows {point}: index +1", lambda p, f=file: _index(p / f), True)
        yield Mutation("rows", f"rows {point}: row_start +1", lambda p, f=file: _rows(p / f, torch.clone, 1), True)
        yield Mutation("rows", f"rows {point}: no tensor", lambda p, f=file: save_file({}, p / f), True)
    shards = sorted(p.relative_to(run).as_posix() for p in run.glob("rows/*/*-00000.safetensors"))
    for mine in shards:
        for theirs in shards:
            if mine != theirs:
                name = f"rows {mine.split('/')[1].rsplit('.', 1)[-1]}: those of {theirs.split('/')[1]}"
                yield Mutation("rows", name, lambda p, a=mine, b=theirs: shutil.copy(p / b, p / a), True)


def _rows(file: Path, way: Callable[[torch.Tensor], torch.Tensor], shift: int = 0) -> None:
    with safe_open(file, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a mapping)
        metadata = f.metadata()
    tensors["rows"] = way(tensors["rows"]).contiguous()
    save_file(tensors, file, metadata={"row_start": str(int(metadata["row_start"]) + shift)})


def _index(file: Path) -> None:
    with safe_open(file, framework="pt") as f:
        rows = f.get_tensor("rows")
        index = f.get_tensor("index") if "index" in f.keys() else torch.arange(len(rows))  # noqa: SIM118
        metadata = f.metadata()
    save_file({"rows": rows, "index": index + 1}, file, metadata=metadata)


def _of_journal(run: Path) -> Iterator[Mutation]:
    lines = (run / "journal.jsonl").read_text().splitlines()
    for i, line in enumerate(lines):
        part = json.loads(line)
        yield Mutation("journal", f"part {i}: deleted", lambda p, i=i: _journal(p, lambda x: x.pop(i)), True)
        yield Mutation("journal", f"part {i}: doubled", lambda p, i=i: _journal(p, lambda x: x.append(x[i])), True)
        for key, value in part.items():
            changes = [("null", None)] if key == "files" else [("+1", value + 1), ("-1", value - 1)]
            for said, v in changes:
                yield Mutation(
                    "journal",
                    f"part {i}.{key}: {said}",
                    lambda p, i=i, k=key, v=v: _journal(p, lambda x: x[i].update({k: v})),
                    True,
                )
        for file in part["files"]:
            yield Mutation(
                "journal",
                f"part {i}: without {file}",
                lambda p, i=i, f=file: _journal(p, lambda x: x[i]["files"].pop(f)),
                True,
            )


def _journal(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    parts = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
    change(parts)
    (path / "journal.jsonl").write_text("".join(json.dumps(p) + "\n" for p in parts))


# ------------------------------------------------------------------ asking


def noticed(run: Path, mutation: Mutation, folder: Path) -> str | None:
    """The check that notices a change of a copy of `run` in `folder`, or None."""
    path = folder / "run"
    shutil.copytree(run, path)
    try:
        mutation.apply(path)
        if mutation.consistent:
            try:
                amend(path)
            except ProbeError:  # what cannot be read was not written by us
                return "cannot be read"
        run_ = load_run(path)
        failed = [c.name for c in verify(run_) if not c.holds]
        return failed[0] if failed else None if run_.complete else "status"
    except ProbeError:
        return "cannot be read"
    finally:
        shutil.rmtree(path)


def survivors(
    run: Path, other: Path, folder: Path, *, every: int = 1, offset: int = 0
) -> tuple[list[Mutation], Counter[tuple[str, str]]]:
    """Changes that go unnoticed, and how many were tried and noticed by kind; of one in so many, from `offset` on."""
    counts: Counter[tuple[str, str]] = Counter()
    left = []
    for i, mutation in enumerate(mutations(run, other)):
        if i % every != offset:
            continue
        kind = f"{mutation.kind}, {'consistent' if mutation.consistent else 'crude'}"
        counts[kind, "tried"] += 1
        if noticed(run, mutation, folder) is None:
            left.append(mutation)
        else:
            counts[kind, "noticed"] += 1
    return left, counts


def excused(mutation: Mutation) -> str | None:
    """The pattern under which a survivor is listed."""
    told = f"{mutation.kind} {mutation.name}"
    return next((p for p in UNDECIDED if mutation.consistent and fnmatch.fnmatchcase(told, p)), None)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--every", type=int, default=1, help="try one change in so many")
    parser.add_argument("--offset", type=int, default=0, help="beginning with this one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run, other = make_good_run(root / "a").path, make_good_run(root / "b", seed=1).path
        left, counts = survivors(run, other, root, every=args.every, offset=args.offset)
    for m in left:
        state = "listed" if excused(m) else "UNLISTED"
        print(f"{state}  {m.kind} {'consistent' if m.consistent else 'crude'}: {m.name}")
    text = _page(left, counts, args.every)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")


def _page(left: list[Mutation], counts: Counter[tuple[str, str]], every: int) -> str:
    kinds = sorted({kind for kind, _ in counts})
    tried, found = (sum(counts[k, what] for k in kinds) for what in ("tried", "noticed"))
    rows = [f"| {k} | {counts[k, 'tried']} | {counts[k, 'noticed']} |" for k in kinds]
    by_pattern = Counter(excused(m) or "not listed: a fault of `verify`" for m in left)
    reasons = [f"| `{p}` | {n} | {UNDECIDED.get(p, '')} |" for p, n in sorted(by_pattern.items())]
    told = {"tried": tried, "found": found, "left": tried - found, "rows": "\n".join(rows)}
    sample = f" (one in {every} of all changes)" if every > 1 else ""
    return _PAGE.format(**told, reasons="\n".join(reasons), sample=sample)


_PAGE = """# What `sglang-probe verify` notices

Written by `python -m tests.verify.mutations --out docs/evidence/verify.md`; `tests/verify/test_mutations.py` asks a
sample of it whenever the tests run.

A good run (`tests/verify/good_run.py`: the real recorder, writer and closing, a made-up engine) is changed in one
place, {tried:,} times{sample}.

`verify` is asked each time. A *crude* change leaves hashes as they are, as damage does. A *consistent* one writes every
hash anew, the journal's, the manifest's and the seal's, as a fault in a writer would: then only what the run says in
two places can give it away. {found:,} changes are noticed, {left:,} are not.

| what is changed | changes | noticed |
|---|---|---|
{rows}

Of consistent changes these go unnoticed, by pattern:

| change | unnoticed | why |
|---|---|---|
{reasons}

What holds against accidents and faults of ours does not hold against somebody who writes a whole run anew: hashes are
no signatures.
"""


if __name__ == "__main__":
    main()
