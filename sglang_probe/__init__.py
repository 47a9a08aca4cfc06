"""sglang-probe: exact accounting of what an LLM serving engine computed.

    import sglang_probe
    run = sglang_probe.load_run("runs/my-run")
    run.spans(), run.requests(), run.forwards()     # pandas frames

Importing this package loads neither torch nor SGLang; both are imported where they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_probe.run.run import Run, load_run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load_run"]


def __getattr__(name: str) -> Any:
    if name in ("Run", "load_run"):
        from sglang_probe.run import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
