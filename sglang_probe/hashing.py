"""The one hash of token sequences: splitmix64, vectorised.

Sums of `mix64` words are compared as if they were the sequences themselves. Two different ones among n collide with
probability about n**2 / 2**65: 3e-4 for a hundred million, 3e-8 for a million.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Hashes = np.ndarray[Any, np.dtype[np.uint64]]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2**64 over the golden ratio: an odd step that spreads consecutive numbers."""


def mix64(x: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele et al. 2014), element by element; a new array."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
