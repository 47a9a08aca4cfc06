"""The keyed hash of prefixes."""

from __future__ import annotations

import numpy as np

from sglang_probe.hashing import keyed_prefix_hashes, siphash24


def test_siphash_is_that_of_its_authors() -> None:
    """The vector of 8 bytes 0 to 7 under the key 0 to 15, from the reference implementation."""
    k0, k1 = (np.uint64(int.from_bytes(bytes(range(8 * i, 8 * i + 8)), "little")) for i in range(2))
    message = np.array([int.from_bytes(bytes(range(8)), "little")], dtype=np.uint64)
    assert int(siphash24(message, k0, k1)[0]).to_bytes(8, "little").hex() == "6224939a79f5f593"


def test_prefixes_are_equal_as_long_as_the_tokens_are_and_under_one_key() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 50_000, 300)
    b = np.concatenate([a[:200], rng.integers(0, 50_000, 100)])
    key = bytes(range(32))
    ours, theirs = keyed_prefix_hashes(a, key), keyed_prefix_hashes(b, key)
    assert (ours == theirs).tolist() == [True] * 200 + [False] * 100
    assert not (ours == keyed_prefix_hashes(a, bytes(32))).any()


def test_the_order_of_tokens_matters() -> None:
    key = bytes(range(32))
    assert keyed_prefix_hashes([1, 2], key)[1] != keyed_prefix_hashes([2, 1], key)[1]
