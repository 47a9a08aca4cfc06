"""The fixture of `tests/made_run.py`."""

from __future__ import annotations

from tests.made_run import make_run

__all__ = ["make_run"]
