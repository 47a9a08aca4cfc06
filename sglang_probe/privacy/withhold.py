"""A run without the rows and token ids of personal data: positions are withheld, and the ledger says which and why.

Rows can be inverted to text, so that scrubbing acts on positions. A run is copied: every position whose token is part
of what was found loses its row at every hook point, in every attempt, and its token id (-1 in its place), and the
neighbours on either side lose their rows, because the next row still carries the token. The table `withheld` has each
with its reason. What was computed and what was reused stays in the ledger as it is.

A position whose token is not in the run is withheld too (`unknown`): nobody can say what it is. Those are the outputs
of requests that were interrupted, discarded steps after the last token, and, in a segment of a server, all positions of
requests that go on in the next segment or ended in the one before.

Two requests with the same tokens up to a position have the same there: what is withheld of one is withheld of both, so
that a prefix that requests share tells nobody's.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError
from sglang_probe.privacy.rule import Withhold, found_in
from sglang_probe.privacy.secrets import manifest_without, secrets_of, told_without
from sglang_probe.run import journal, schema, seal, shards
from sglang_probe.run import tokens as positions
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.manifest import MANIFEST, write_manifest
from sglang_probe.run.run import Run, load_run

Array = np.ndarray[Any, Any]
_ORACLE = "embedding.parquet"
NEIGHBOUR = "neighbour"
"""Reason of a position whose own token is no part of what was found."""
UNKNOWN = "unknown"
"""Reason of a position whose token is not in the run."""
_COPIED = ("interventions.json", "scores.safetensors", "probe.yaml", "fault.txt")
"""Files that hold no token ids, copied as they are. Cards and reports are not copied: they may quote the text."""


def reasons_of(
    requests: pd.DataFrame, vocabulary: Vocabulary, rule: Withhold, ends: Mapping[str, int] | None = None
) -> dict[str, Array]:
    """By request the reason of each of its positions, object `[length]`; None: it is not withheld.

    Args:
        ends: by request one past its last position in the ledger; of positions before it that have no token in
            `requests` the reason is `unknown`.
    """
    found: dict[str, Array] = {}
    keys: dict[str, list[int]] = {}
    shared: dict[int, str] = {}
    ends = ends or {}
    for rid in ends.keys() - set(requests["rid"]):
        found[rid], keys[rid] = np.full(ends[rid], UNKNOWN, dtype=object), []
    for r in requests.itertuples():
        ids = [] if r.prompt_ids is None else [*r.prompt_ids, *(() if r.output_ids is None else r.output_ids)]
        ids = [int(i) for i in ids]
        reasons = np.full(max(len(ids), ends.get(r.rid, 0)), UNKNOWN, dtype=object)
        reasons[: len(ids)] = [UNKNOWN if i < 0 else None for i in ids]
        for start, end, kind in found_in(ids, vocabulary, rule):
            reasons[start:end] = kind
        found[r.rid] = reasons
        keys[r.rid] = _prefix_keys(ids)
        own = [p for p in range(len(ids)) if reasons[p] not in (None, UNKNOWN)]
        shared.update((keys[r.rid][p], reasons[p]) for p in own)
    for rid, reasons in found.items():
        for p, key in enumerate(keys[rid]):
            if reasons[p] is None and key in shared:
                reasons[p] = shared[key]
        near = np.flatnonzero(reasons.astype(bool) & (reasons != UNKNOWN))
        for distance in range(1, rule.neighbours + 1):
            for beside in (near - distance, near + distance):
                inside = beside[(beside >= 0) & (beside < len(reasons))]
                reasons[inside[~reasons[inside].astype(bool)]] = NEIGHBOUR
    return found


def withhold(run: Run, output: Path, model: Path, rule: Withhold) -> dict[str, int]:
    """Write a copy of a closed run without what is personal. Returns positions by reason.

    Args:
        output: a folder that does not exist yet; it is there with everything or not at all.
        model: folder with the tokenizer.

    Raises:
        ConfigError: the folder exists; the run is not closed, has no token ids, or was scrubbed before.
    """
    if output.exists():
        raise ConfigError(f"{output} exists", fix="name another folder")
    if not seal.closed(run.manifest):
        raise ConfigError(f"{run.path} is not closed", fix="finish it first (`--resume`, or `POST /probe/flush`)")
    if run.manifest.get("withheld"):
        raise ConfigError(f"{run.path} had positions withheld already", fix="begin with the run as it was recorded")
    if run.manifest.get("privacy", "ids") != "ids":
        raise ConfigError(
            f"{run.path} has no token ids (`privacy: {run.manifest['privacy']}`), and what is in it cannot be found",
            fix="record with `live: {privacy: ids}`",
        )
    vocabulary = Vocabulary.load(model)
    ends = run.spans().groupby("rid")["end"].max().to_dict()
    reasons = reasons_of(run.requests(interrupted=True), vocabulary, rule, ends)
    made = _unfinished(output)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        counts = _copy(run, made, reasons, vocabulary, rule)
        made.rename(output)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return counts


def withhold_in_place(run: Run, model: Path, rule: Withhold) -> Run:
    """Put the copy in the place of a run, which is deleted. Arguments and errors as of `withhold`.

    A kill leaves one of these, and `settle_in_place` finishes it; `partial` is what `withhold` has not finished. The
    caller holds the directory, of both.

        step                                      run         beside it            `settle_in_place`
        the copy is written                       raw         partial, scrubbed    deletes what is beside it
        the run is renamed                        nothing     raw, scrubbed        puts the copy there, deletes the raw
        the copy is renamed, the raw is deleted   scrubbed    raw, or some of it   deletes it
    """
    scrubbed, raw = (_beside(run.path, what) for what in ("scrubbed", "raw"))
    settle_in_place(run.path)
    withhold(run, scrubbed, model, rule)
    run.path.rename(raw)
    journal.sync_folder(raw.parent)
    scrubbed.rename(run.path)
    journal.sync_folder(raw.parent)
    shutil.rmtree(raw)
    return load_run(run.path)


def settle_in_place(path: Path) -> None:
    """Finish what a killed `withhold_in_place` left beside the run directory `path`. The caller holds the directory.

    Raises:
        OSError: what it left cannot be deleted.
    """
    scrubbed, raw = (_beside(path, what) for what in ("scrubbed", "raw"))
    if raw.exists() and not path.exists():
        (scrubbed if scrubbed.exists() else raw).rename(path)
        journal.sync_folder(path.parent)
    for left in (raw, scrubbed, _unfinished(scrubbed)):
        if left.exists():
            shutil.rmtree(left)


def is_scrubbed(path: Path) -> bool:
    """Whether a run is there from which positions were taken out."""
    return (path / MANIFEST).exists() and bool(load_run(path).manifest.get("withheld"))


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _unfinished(output: Path) -> Path:
    return _beside(output, "partial")


def _copy(run: Run, made: Path, reasons: Mapping[str, Array], vocabulary: Vocabulary, rule: Withhold) -> dict[str, int]:
    table = _table(reasons)
    gone = _rows_gone(run, reasons)
    own = {rid: np.array([isinstance(x, str) and x != NEIGHBOUR for x in told]) for rid, told in reasons.items()}
    secrets = secrets_of(run.requests(interrupted=True), own, vocabulary, rule)
    first = True
    for part in run.parts():
        files: dict[str, str] = {}
        for name in part.files:
            target = made / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name.startswith("rows/"):
                files[name] = _shard(run.path / name, target, part, gone)
            elif name.startswith("ledger/requests-"):
                files[name] = _rewritten(run.path / name, target, lambda t: _ids(t, own, prompt=False))
            elif name.startswith("ledger/prompts-"):
                files[name] = _rewritten(run.path / name, target, lambda t: _ids(t, own, prompt=True))
            elif name.startswith("ledger/monitored-"):
                files[name] = _rewritten(run.path / name, target, lambda t: _without(t, reasons))
            else:
                shutil.copyfile(run.path / name, target)
                files[name] = part.files[name]
        if first and len(table):
            first = False
            name = f"ledger/withheld-{part.stem}.parquet"
            files[name] = journal.write_durably(made / name, lambda p: pq.write_table(table, p, compression="zstd"))
        journal.append(made, replace(part, files=files))
    _rewritten(
        run.path / REQUESTS_FILE, made / REQUESTS_FILE, lambda t: told_without(_ids(t, own, prompt=True), secrets)
    )
    for source in [*(run.path / name for name in _COPIED), *run.path.glob("kept*.safetensors")]:
        if source.exists():
            shutil.copyfile(source, made / source.name)
    _oracle(run, made)
    counts = pd.Series([x for told in reasons.values() for x in told if x is not None], dtype=object).value_counts()
    told = {str(k): int(v) for k, v in counts.items()}
    copied = {
        **manifest_without(run.manifest, secrets),
        "withheld": {**rule.model_dump(mode="json"), "positions": told},
        "columns_digest": None,
    }
    _close(made, copied)
    return told


def _close(made: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of the copy, with the files that it has, and seal it."""
    write_manifest(made, manifest)
    opened = load_run(made)
    manifest["files"] = opened.recorded_files()
    seal.close(made, manifest)


def _table(reasons: Mapping[str, Array]) -> pa.Table:
    """`schema.WITHHELD`: runs of positions with one reason."""
    rows = []
    for rid, told in reasons.items():
        marked = np.array([x or "" for x in told], dtype=object)
        if not len(marked):
            continue
        cuts = [0, *(np.flatnonzero(marked[1:] != marked[:-1]) + 1).tolist(), len(marked)]
        rows += [
            {"rid": rid, "start": a, "end": b, "reason": marked[a]} for a, b in itertools.pairwise(cuts) if marked[a]
        ]
    return pa.Table.from_pylist(rows, schema=schema.WITHHELD)


def _rows_gone(run: Run, reasons: Mapping[str, Array]) -> Array:
    """Numbers of the rows of withheld positions, of every attempt, ascending."""
    spans = run.spans()
    tokens = positions.expand(spans[spans["row_start"] >= 0])
    gone = [_is_withheld(reasons, r, p) for r, p in zip(tokens["rid"], tokens["position"], strict=True)]
    return np.unique(tokens["row"].to_numpy()[np.array(gone, dtype=bool)])


def _is_withheld(reasons: Mapping[str, Array], rid: str, position: int) -> bool:
    """Also where nothing is known of the position."""
    told = reasons.get(rid)
    return told is None or position >= len(told) or told[position] is not None


def _shard(source: Path, target: Path, part: journal.Part, gone: Array) -> str:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, framework="pt") as f:
        metadata = f.metadata()
    rows, index = shards.rows_of(source), shards.index_of(source)
    number = np.arange(len(rows)) if index is None else index
    keep = ~np.isin(number + part.rows_end - part.rows, gone)
    tensors = {
        shards.ROWS_KEY: rows[torch.from_numpy(np.flatnonzero(keep))].contiguous(),
        shards.INDEX_KEY: torch.from_numpy(number[keep].astype(np.int64)),
    }
    return journal.write_durably(target, lambda p: save_file(tensors, p, metadata=metadata))


def _rewritten(source: Path, target: Path, change: Any) -> str:
    table = change(pq.read_table(source))
    return journal.write_durably(target, lambda p: pq.write_table(table, p, compression="zstd"))


def _ids(table: pa.Table, own: Mapping[str, Array], *, prompt: bool) -> pa.Table:
    """With -1 in place of token ids that are part of what was found, or that nobody can place."""
    rids = table["rid"].to_pylist()
    lengths = table["prompt_len"].to_pylist() if "prompt_len" in table.column_names else [None] * len(rids)
    for name in ("prompt_ids", "output_ids"):
        if name not in table.column_names or (name == "prompt_ids" and not prompt):
            continue
        cleaned = []
        for rid, ids, length in zip(rids, table[name].to_pylist(), lengths, strict=True):
            first = 0 if name == "prompt_ids" else length
            if ids is not None:
                told = np.empty(0, bool) if first is None or rid not in own else own[rid][first : first + len(ids)]
                ids = [i if k < len(told) and not told[k] else -1 for k, i in enumerate(ids)]
            cleaned.append(ids)
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array(cleaned, type=table.schema.field(name).type))
    return table


def _without(table: pa.Table, reasons: Mapping[str, Array]) -> pa.Table:
    """Without what a monitor read of withheld positions."""
    keep = [
        not _is_withheld(reasons, rid, p)
        for rid, p in zip(table["rid"].to_pylist(), table["position"].to_pylist(), strict=True)
    ]
    return table.filter(pa.array(keep, type=pa.bool_()))


def _oracle(run: Run, made: Path) -> None:
    """Hashes of the embeddings of tokens that still occur: of others they would say that they did."""
    source = run.path / _ORACLE
    if not source.exists():
        return
    left = pq.read_table(made / REQUESTS_FILE, columns=["prompt_ids", "output_ids"])
    ids = {i for name in left.column_names for x in left[name].to_pylist() if x is not None for i in x}
    table = pq.read_table(source)
    keep = pa.array([i in ids for i in table["token_id"].to_pylist()], type=pa.bool_())
    journal.write_durably(made / _ORACLE, lambda p: pq.write_table(table.filter(keep), p))


def _prefix_keys(ids: Iterable[int]) -> list[int]:
    """A hash of the tokens up to each position, that one included."""
    keys, now = [], 0
    for i in ids:
        now = hash((now, i))
        keys.append(now)
    return keys
