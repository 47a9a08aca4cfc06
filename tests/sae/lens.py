"""What needs SAELens."""

from __future__ import annotations

import importlib.util

import pytest

needs_sae_lens = pytest.mark.skipif(
    importlib.util.find_spec("sae_lens") is None, reason="SAELens, the extra [sae], is not installed"
)
