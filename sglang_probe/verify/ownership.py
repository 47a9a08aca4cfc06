"""Ownership by content: the embedding row of a captured position is `embed(token_id)`, bit for bit.

The oracle travels with the run as one 64-bit hash per token that occurs (`embedding.parquet`), taken from the model's
weights and not from captured rows, so that the check is as strict on a machine that does not have the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import journal
from sglang_probe.run.damage import read_table, reading
from sglang_probe.run.hook_points import EMBED
from sglang_probe.run.run import Run
from sglang_probe.verify import segment
from sglang_probe.verify.check import Check

if TYPE_CHECKING:
    import torch

ORACLE_FILE = "embedding.parquet"
_ORACLE = pa.schema([("token_id", pa.int32()), ("hash", pa.uint64())])
_WEIGHTS_KEY = b"weights_sha256"
_CHUNK = 16384
Hashes = np.ndarray[Any, np.dtype[np.uint64]]


def rows_match_tokens(run: Run, *, embedding: torch.Tensor | None = None) -> Check:
    """Compare the `hook_embed` row of every position whose token is known with that token's embedding.

    Covers the last attempt of each request; rows of earlier attempts and interrupted outputs are counted in the note.

    Args:
        embedding: the model's matrix `[vocabulary, width]`; by default the hashes in the run are used. A run without
            them (a model that could not be read when it was recorded) is checked for consistency only, under the name
            `consistency`; that cannot see an exchange between tokens that occur once.
    """
    tokens = run.tokens(interrupted=True)
    # -1: of a request whose ids are not in this segment, because it goes on in the next one.
    known_ids = tokens["token_id"].fillna(-1) >= 0
    tokens = tokens[run.holds(EMBED, tokens["row"].to_numpy()) & known_ids].sort_values("row")
    later = len(tokens)
    if (known := segment.known_weights(run)) is not None:
        tokens = tokens[np.isin(tokens["forward_id"].to_numpy(np.int64), known)]
    later -= len(tokens)
    ids = tokens["token_id"].to_numpy(np.int64)
    hashes = _hash_captured(run, tokens["row"].to_numpy())
    unchecked = sum(len(numbers) for numbers, _ in run.iter_shards(EMBED)) - len(tokens) - later
    note = f"{unchecked} rows of earlier attempts or unknown tokens were not compared" if unchecked else None
    if embedding is not None or (run.path / ORACLE_FILE).exists():
        name, claim = "content", "the hook_embed row of a position equals embed(token_id), bit for bit"
        same = hashes == (_oracle(run, ids) if embedding is None else _hash_tokens(run, embedding, ids))
    else:
        name, claim = "consistency", "hook_embed rows of one token are equal, of different tokens different"
        note = "the run holds no embedding oracle and no model is at hand: exchanges of rare tokens go unseen"
        same = hashes == _first_seen(ids, hashes)
    if later:
        note = f"{note}; " if note else ""
        note += f"{later} rows were computed after an update of the weights, and are not those of the model's path"
    violation = None
    if not same.all():
        bad = tokens.iloc[int(np.argmin(same))]
        violation = (
            f"{bad['rid']} position {bad['position']} (token {int(bad['token_id'])}, row {bad['row']}): "
            f"the row is another token's; {int((~same).sum())} of {len(tokens)} rows are wrong"
        )
    if violation is None and name == "content" and embedding is None:
        violation = _covers(run)
    return Check(name, claim, len(tokens), "rows", violation, note)


def _covers(run: Run) -> str | None:
    """The oracle has the tokens of the run, each once: those of `write_oracle`."""
    known = read_table(run.path / ORACLE_FILE, _ORACLE)["token_id"].to_numpy()
    if (np.diff(known) <= 0).any():
        return f"{ORACLE_FILE} does not have each token once, in order"
    requests = run.requests(interrupted=True)
    lists = [x for column in ("prompt_ids", "output_ids") for x in requests[column] if x is not None]
    there = np.unique(np.concatenate(lists)) if lists else np.empty(0, np.int64)
    other = np.setxor1d(known, there[there >= 0])  # -1: withheld
    return f"{ORACLE_FILE} and requests.parquet do not have the same tokens: {other[0]}" if len(other) else None


def write_oracle(
    run: Run, embedding: torch.Tensor, token_ids: Iterable[int], *, weights: Mapping[str, str] | None = None
) -> None:
    """Store the hash of the embedding of each of `token_ids`, in the dtype that the run captured.

    Args:
        weights: SHA-256 by name of the files that the matrix comes from; stored with it (`oracle_weights`).
    """
    import torch

    ids = np.unique(np.fromiter(token_ids, dtype=np.int64))
    dtype = run.rows_dtype()
    hashes = hash_rows(embedding[torch.from_numpy(ids)].to(dtype))
    table = pa.table({"token_id": pa.array(ids, pa.int32()), "hash": pa.array(hashes, pa.uint64())})
    if weights is not None:
        table = table.replace_schema_metadata({_WEIGHTS_KEY: json.dumps(dict(weights), sort_keys=True)})
    journal.write_durably(run.path / ORACLE_FILE, lambda path: pq.write_table(table, path))


def oracle_weights(run: Run) -> dict[str, str] | None:
    """SHA-256 by name of the weights that the oracle was made from; None if it does not say.

    Raises:
        RunDirectoryError: the oracle is damaged.
    """
    with reading(run.path / ORACLE_FILE):
        told = (pq.ParquetFile(run.path / ORACLE_FILE).schema_arrow.metadata or {}).get(_WEIGHTS_KEY)
        return None if told is None else dict(json.loads(told))


def hash_rows(rows_ND: torch.Tensor) -> Hashes:
    """A 64-bit hash of each row's bytes, `[n]`: a fixed random linear form over its 16-bit words, modulo 2**64.

    Two different rows collide with a chance below 2**-47 (odd random multipliers, words below 2**16; compare
    Dietzfelbinger et al. 1997). That is for accidents; it does not withstand an adversary.
    """
    import torch

    words = rows_ND.contiguous().view(torch.int16).numpy().astype(np.uint16).astype(np.uint64)
    random = np.random.default_rng(20261121)
    multipliers = random.integers(0, 2**64, size=words.shape[1], dtype=np.uint64) | np.uint64(1)
    with np.errstate(over="ignore"):
        return np.asarray((words * multipliers).sum(axis=1, dtype=np.uint64))


def load_embedding(model_path: str | Path) -> torch.Tensor | None:
    """The embedding matrix of a local model folder in safetensors format; None if there is none."""
    from safetensors import safe_open

    for file in sorted(Path(model_path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            for key in f.keys():  # noqa: SIM118 (not a mapping)
                if key.endswith(("embed_tokens.weight", "wte.weight")):
                    return f.get_tensor(key)
    return None


def _hash_captured(run: Run, rows: np.ndarray[Any, Any]) -> Hashes:
    """Hashes of the captured rows with these ascending indices, one shard in memory at a time."""
    pieces = []
    for numbers, shard in run.iter_shards(EMBED):
        if shard.ndim != 2 or len(shard) != len(numbers):
            raise RunDirectoryError(f"{EMBED}: rows of the shape {list(shard.shape)} are not those of {len(numbers)}")
        low, high = np.searchsorted(rows, [numbers[0], numbers[-1] + 1])
        at = np.searchsorted(numbers, rows[low:high])
        pieces += [hash_rows(shard[at[i : i + _CHUNK].tolist()]) for i in range(0, len(at), _CHUNK)]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint64)


def _hash_tokens(run: Run, embedding: torch.Tensor, ids: np.ndarray[Any, Any]) -> Hashes:
    dtype = run.rows_dtype()
    unique, inverse = np.unique(ids, return_inverse=True)
    return np.asarray(hash_rows(embedding[unique.tolist()].to(dtype))[inverse])


def _oracle(run: Run, ids: np.ndarray[Any, Any]) -> Hashes:
    """Recorded hash of each token's embedding; zero for a token that the oracle does not know."""
    table = read_table(run.path / ORACLE_FILE, _ORACLE, never_null=_ORACLE.names)
    known, hashes = table["token_id"].to_numpy(), table["hash"].to_numpy()
    if not len(known):
        return np.zeros(len(ids), dtype=np.uint64)
    at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.asarray(np.where(known[at] == ids, hashes[at], np.uint64(0)), dtype=np.uint64)


def _first_seen(ids: np.ndarray[Any, Any], hashes: Hashes) -> Hashes:
    """For each row the hash of the first row of its token; a hash that two tokens share is replaced by zero."""
    unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    firsts = hashes[first]
    values, counts = np.unique(firsts, return_counts=True)
    shared = np.isin(firsts, values[counts > 1])
    return np.asarray(np.where(shared, np.uint64(0), firsts)[inverse]) if len(unique) else hashes
