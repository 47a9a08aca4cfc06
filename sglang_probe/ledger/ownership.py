"""Ownership by content: the embedding row of a captured position is `embed(token_id)`, bit for bit.

The oracle travels with the run as one 64-bit hash per token that occurs (`embedding.parquet`), taken from the model's
weights and not from captured rows, so that the check is as strict on a machine that does not have the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sglang_probe.capture import journal
from sglang_probe.capture.hook_points import EMBED
from sglang_probe.ledger.check import Check
from sglang_probe.ledger.run import Run

if TYPE_CHECKING:
    import torch

ORACLE_FILE = "embedding.parquet"
Hashes = np.ndarray[Any, np.dtype[np.uint64]]


def rows_match_tokens(run: Run, *, embedding: torch.Tensor | None = None) -> Check:
    """Compare every captured `hook_embed` row with its token's embedding.

    Args:
        embedding: the model's matrix `[vocabulary, width]`; by default the hashes in the run are used. A run without
            them (a model that could not be read when it was recorded) is checked for consistency only, which cannot
            see an exchange between tokens that occur once.
    """
    import torch

    tokens = run.tokens()
    tokens = tokens[(tokens["row"] >= 0) & tokens["token_id"].notna()]
    ids = tokens["token_id"].to_numpy(np.int64)
    rows = run.rows(EMBED, tokens["row"].to_numpy())
    name, reference, note = "content", "embed(token_id)", None
    if embedding is not None:
        same = np.asarray((rows == embedding.to(rows.dtype)[torch.from_numpy(ids)]).all(dim=1))
    else:
        hashes = hash_rows(rows)
        expected = _oracle(run)
        if expected is None:
            reference = "the other rows of its token"
            note = "the run holds no embedding oracle and no model is at hand: checked for consistency only"
            same = hashes == _first_seen(ids, hashes)
        else:
            same = hashes == np.array([expected.get(int(i), 0) for i in ids], dtype=np.uint64)
    claim = f"the hook_embed row of every captured position equals {reference}"
    violation = None
    if not same.all():
        bad = tokens.iloc[int(np.argmin(same))]
        violation = (
            f"{bad['rid']} position {bad['position']} (token {int(bad['token_id'])}, row {bad['row']}): "
            f"the row is another token's; {int((~same).sum())} of {len(tokens)} rows are wrong"
        )
    return Check(name, claim, len(tokens), "rows", violation, note)


def write_oracle(run: Run, embedding: torch.Tensor, token_ids: Iterable[int]) -> None:
    """Store the hash of the embedding of each of `token_ids`, in the dtype that the run captured."""
    import torch

    ids = np.unique(np.fromiter(token_ids, dtype=np.int64))
    dtype = run.rows(EMBED, [0]).dtype
    hashes = hash_rows(embedding[torch.from_numpy(ids)].to(dtype))
    table = pa.table({"token_id": pa.array(ids, pa.int32()), "hash": pa.array(hashes, pa.uint64())})
    journal.write_durably(run.path / ORACLE_FILE, lambda path: pq.write_table(table, path))


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


def _oracle(run: Run) -> dict[int, int] | None:
    path = run.path / ORACLE_FILE
    if not path.exists():
        return None
    table = pq.read_table(path).to_pydict()
    return dict(zip(table["token_id"], table["hash"], strict=True))


def _first_seen(ids: np.ndarray[Any, Any], hashes: Hashes) -> Hashes:
    """For each row the hash of the first row of its token; a hash that two tokens share is replaced by zero."""
    unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    firsts = hashes[first]
    values, counts = np.unique(firsts, return_counts=True)
    shared = np.isin(firsts, values[counts > 1])
    return np.asarray(np.where(shared, np.uint64(0), firsts)[inverse]) if len(unique) else hashes
