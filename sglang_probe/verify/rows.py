"""Rows of every hook point: each has one owner, and is a row that this hook point of this model can have.

Shards are read one at a time, so that a run of any size is checked in the memory of one shard and a 64-bit hash a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_probe.run import journal
from sglang_probe.run import tokens as positions
from sglang_probe.run.damage import reading
from sglang_probe.run.hook_points import EMBED, RESID_POST, parse_hook_point, score_points
from sglang_probe.run.run import Run
from sglang_probe.run.shards import INDEX_KEY, ROWS_KEY, index_of
from sglang_probe.verify.check import Check
from sglang_probe.verify.files import Progress, nothing
from sglang_probe.verify.ownership import hash_rows

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
_CHUNK = 16384


def rows_owned_once(run: Run) -> Check:
    """Every captured row belongs to exactly one computed position. Numbers of rows that were not selected count too."""
    name, claim = "row ownership", "every captured row belongs to exactly one computed position"
    spans = run.spans()
    with_rows = spans[spans["row_start"] >= 0]
    total = run.row_count()
    if with_rows.empty:
        violation = f"{total} rows were captured and no span has any" if total else None
        return Check(name, claim, total, "rows", violation)
    claimed = positions.expand(with_rows)["row"].to_numpy()
    captured = np.concatenate([np.arange(p.rows_end - p.rows, p.rows_end) for p in run.parts()])
    place = np.minimum(np.searchsorted(captured, claimed), max(total - 1, 0))
    unknown = claimed if not total else claimed[captured[place] != claimed]
    violation = None
    if len(unknown):
        violation = f"a span claims row {unknown[0]}, which does not exist; {total} do"
    else:
        owners = np.bincount(place, minlength=total)
        if (bad := np.flatnonzero(owners != 1)).size:
            violation = f"row {captured[bad[0]]} has {owners[bad[0]]} owners"
    return Check(name, claim, total, "rows", violation)


@dataclass(frozen=True)
class Shard:
    """One file of rows, as it is on disk."""

    file: str
    part: journal.Part
    rows: torch.Tensor
    index: Array | None
    row_start: str | None


def rows_are_possible(run: Run, *, proved: bool = True, progress: Progress = nothing) -> Check:
    """Shape, dtype, number and values of the rows of every hook point.

    Args:
        proved: whether the rows of `hook_embed` are those of their tokens, so that others can be told apart by them.
    """
    name = "rows"
    claim = "every hook point has all its rows, of the model's width and dtype, finite, and different for other tokens"
    covered, violation = 0, None
    dtype = run.manifest.get("rows_dtype")
    embedded: Array | None = None
    blank: set[int] = set()
    sums: dict[str, str] = {}
    points = sorted(run.hook_points, key=lambda h: h != EMBED)
    widths: dict[str, int] = {}
    scores = score_points(run.hook_points)
    for done, h in enumerate(points):
        hashes = []
        if h in scores:
            continue  # asked by themselves: verify/scores.py
        for shard in shards_of(run, h):
            progress(f"rows of {h}", done, len(points))
            dtype = dtype or str(shard.rows.dtype).removeprefix("torch.")
            violation = shape_of(run, h, shard, dtype, widths) or _values(h, shard, blank if proved else set())
            if violation:
                return Check(name, claim, covered, "rows", f"{shard.file}: {violation}")
            covered += len(shard.rows)
            hashes.append(_hashed(shard.rows))
            twin = sums.setdefault(hashlib.sha256(hashes[-1].tobytes()).hexdigest(), h)
            if len(shard.rows) > 1 and twin != h and not _may_be_equal(h, twin):
                return Check(name, claim, covered, "rows", f"{shard.file}: {twin} has the same rows")
        numbers = _numbers(run, h)
        if (violation := missing_rows(run, h)) is not None:
            return Check(name, claim, covered, "rows", violation)
        flat = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        if h == EMBED and proved and h not in run.selected.partial:
            embedded = flat
        elif embedded is not None and (violation := _told_apart(h, flat, embedded, numbers, run)):
            return Check(name, claim, covered, "rows", violation)
    note = None
    if run.hook_points and EMBED not in run.hook_points:
        note = (
            f"without {EMBED} among the hook points, whose a row is follows from the ledger, and not from its content"
        )
    return Check(name, claim, covered, "rows", None, note)


def shards_of(run: Run, hook_point: str) -> Iterator[Shard]:
    """Every shard of a hook point.

    Raises:
        RunDirectoryError: one cannot be read, or holds something else.
    """
    from safetensors import safe_open

    for part in run.parts():
        file = f"rows/{hook_point}/shard-{part.stem}.safetensors"
        if file not in part.files:
            continue
        with reading(run.path / file), safe_open(run.path / file, framework="pt") as f:
            names = set(f.keys())
            if ROWS_KEY not in names or names - {ROWS_KEY, INDEX_KEY}:
                raise KeyError(f"it holds {', '.join(sorted(names))}, not `{ROWS_KEY}`")
            index = f.get_tensor(INDEX_KEY).numpy() if INDEX_KEY in names else None
            told = (f.metadata() or {}).get("row_start")
            shard = Shard(file, part, f.get_tensor(ROWS_KEY), index, told)
        yield shard


def shape_of(run: Run, hook_point: str, shard: Shard, dtype: str, widths: dict[str, int]) -> str | None:
    """What is wrong with the shape, the dtype or the numbers of a shard's rows.

    Args:
        widths: of what was seen before, by kind of hook point; added to.
    """
    rows, part, index = shard.rows, shard.part, shard.index
    if rows.ndim != 2 or not len(rows):
        return f"rows have the shape {list(rows.shape)}"
    if str(rows.dtype).removeprefix("torch.") != dtype:
        return f"rows are {rows.dtype}, and the run's are {dtype}"
    if shard.row_start is not None and shard.row_start != str(part.rows_end - part.rows):
        return (
            f"its rows begin at {shard.row_start}, says the file, and at {part.rows_end - part.rows}, says the journal"
        )
    if index is None:
        if hook_point in run.selected.partial and len(rows) != part.rows:
            return f"it has {len(rows)} rows and no index, and some positions were selected"
        if len(rows) != part.rows:
            return f"it has {len(rows)} rows, and its part numbered {part.rows}"
    else:
        if hook_point not in run.selected.partial:
            return "it holds some rows, and every position was selected"
        if index.ndim != 1 or len(index) != len(rows) or (np.diff(index) <= 0).any():
            return "the numbers of its rows are not ascending, one a row"
        if index[0] < 0 or index[-1] >= part.rows:
            return f"it numbers row {index[-1]}, and its part has {part.rows}"
    width = widths.setdefault(_kind(run, hook_point), _width(run, hook_point) or rows.shape[1])
    return None if rows.shape[1] == width else f"rows are {rows.shape[1]} wide, and {width} is the model's width here"


def _kind(run: Run, hook_point: str) -> str:
    """Hook points that have one width."""
    site = parse_hook_point(hook_point).site
    if site in (EMBED, RESID_POST):
        return "residual"
    return (
        f"{site} {len(run.head_numbers(hook_point))}" if hook_point in (run.manifest.get("heads") or {}) else hook_point
    )


def _width(run: Run, hook_point: str) -> int | None:
    if hook_point in (run.manifest.get("heads") or {}):
        heads, head_dim = run.heads(hook_point)
        return heads * head_dim
    if parse_hook_point(hook_point).in_attention:
        return None
    config = run.manifest.get("model_config") or {}
    width = config.get("hidden_size") or (config.get("text_config") or {}).get("hidden_size")
    return None if width is None else int(width)


def _values(hook_point: str, shard: Shard, blank: set[int]) -> str | None:
    """What is wrong with the values of a shard's rows.

    Args:
        blank: numbers of rows whose token is embedded as zero (padding, which SGLang runs in the place of a refused
            prompt); those of `hook_embed` are added. Where the stream begins at zero it may stay there.
    """
    first = shard.part.rows_end - shard.part.rows
    for begin in range(0, len(shard.rows), _CHUNK):
        rows = shard.rows[begin : begin + _CHUNK]
        bad = ~rows.isfinite().all(1)
        if bool(bad.any()):
            return f"row {begin + int(bad.int().argmax())} of the file is not finite"
        for at in (begin + (rows == 0).all(1).nonzero().flatten()).tolist():
            number = first + at if shard.index is None else first + int(shard.index[at])
            if hook_point == EMBED:
                blank.add(number)
            elif number not in blank:
                return f"row {at} of the file is zero"
    return None


def _hashed(rows: torch.Tensor) -> Array:
    return np.concatenate([hash_rows(rows[i : i + _CHUNK]) for i in range(0, len(rows), _CHUNK)])


def _numbers(run: Run, hook_point: str) -> Array:
    """Numbers of a hook point's rows, ascending."""
    pieces = []
    for part in run.parts():
        file = f"rows/{hook_point}/shard-{part.stem}.safetensors"
        if file in part.files:
            index = index_of(run.path / file)
            pieces.append(part.rows_end - part.rows + (np.arange(part.rows) if index is None else index))
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def missing_rows(run: Run, hook_point: str) -> str | None:
    """Which part lacks its shard of a hook point that holds every row."""
    if hook_point in run.selected.partial:
        return None  # asked row by row: verify/selected.py
    for part in run.parts():
        file = f"rows/{hook_point}/shard-{part.stem}.safetensors"
        if part.rows and file not in part.files:
            return f"part {part.number} numbered {part.rows} rows, and {file} is not in the journal"
    return None


def _told_apart(hook_point: str, hashes: Array, embedded: Array, numbers: Array, run: Run) -> str | None:
    """Rows that are equal, bit for bit, are of equal embeddings: a row of another token has other bits.

    Equal rows of one token are no fault: where all tokens before are the same ones, they must be equal.
    """
    starts = np.concatenate([np.arange(p.rows_end - p.rows, p.rows_end) for p in run.parts()])
    token = embedded[np.searchsorted(starts, numbers)]
    order = np.lexsort((token, hashes))
    same = (hashes[order][1:] == hashes[order][:-1]) & (token[order][1:] != token[order][:-1])
    if not same.any():
        return None
    i = int(np.argmax(same))
    return f"{hook_point}: rows {numbers[order[i]]} and {numbers[order[i + 1]]} are equal, and their tokens are not"


def _may_be_equal(one: str, other: str) -> bool:
    """Before and after the rotary embedding a row is the same at position 0."""
    a, b = parse_hook_point(one), parse_hook_point(other)
    return a.layer == b.layer and a.site.replace("rot_", "") == b.site.replace("rot_", "")
