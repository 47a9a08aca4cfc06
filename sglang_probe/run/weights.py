"""One hash for the weights of a model: how manifests, cards of vectors and deployments tell models apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from sglang_probe.run import journal


def weight_hash(weights_sha256: Mapping[str, str] | None) -> str | None:
    """One hash of a model's weight files: SHA-256 over their digests, sorted; names do not count.

    Args:
        weights_sha256: SHA-256 by file (`model: weights_sha256` of a manifest).

    Returns:
        None where the files are unknown.
    """
    if not weights_sha256:
        return None
    return hashlib.sha256("\n".join(sorted(weights_sha256.values())).encode()).hexdigest()


def weight_hash_of_folder(model: str | Path) -> str | None:
    """`weight_hash` of the files in a model's folder, which are all read; None where there are none."""
    folder = Path(model)
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else []
    return weight_hash({p.name: journal.sha256(p) for p in files})
