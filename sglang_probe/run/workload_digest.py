"""The workload's columns of `requests.parquet`, and one digest of them.

The manifest has the digest from before anything is served, so that the table, which is written when a run is closed,
can be compared with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sglang_probe.run import schema

COLUMNS = ("index", "family", "prompt_ids", "segments", "sampling_params", "labels", *schema.TRUTH.names)
"""Columns of `requests.parquet` that are the workload's."""


def digest_of_columns(records: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over `COLUMNS` of requests in the order of their index, each once."""
    h = hashlib.sha256()
    for record in records:
        h.update(np.asarray(record["prompt_ids"], dtype=np.int32).tobytes())
        told = {name: record.get(name) for name in COLUMNS if name != "prompt_ids"}
        h.update(json.dumps(told, sort_keys=True).encode() + b"\n")
    return h.hexdigest()
