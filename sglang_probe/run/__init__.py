"""The run directory: what it is, and reading it. Needs neither SGLang nor a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_probe.lazy import lazily

if TYPE_CHECKING:
    from sglang_probe.run.run import Run, load_run

__all__ = ["Run", "load_run"]

__getattr__ = lazily(__name__, {"Run": "run", "load_run": "run"})
