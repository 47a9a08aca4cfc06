"""sglang-probe: exact accounting of what an LLM serving engine computed.

    from sglang_probe import load_run, record

    if __name__ == "__main__":                      # SGLang starts processes that import the script
        run = record("runs/mine", model="probe-text", prompts=["import json"], hook_points=["hook_embed"])
        run = load_run("runs/mine")
        run.spans(), run.requests(), run.forwards()     # pandas frames

Importing this package loads neither torch nor SGLang; both are imported where they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_probe.lazy import lazily

if TYPE_CHECKING:
    from sglang_probe.harvest.api import Experiment, record
    from sglang_probe.kept_set import Kept as KeptSet
    from sglang_probe.run.run import Run, load_run

__version__ = "0.1.0"
__all__ = ["Experiment", "KeptSet", "Run", "__version__", "load_run", "record"]

__getattr__ = lazily(
    __name__,
    {
        "Experiment": "harvest.api",
        "KeptSet": "kept_set:Kept",
        "Run": "run.run",
        "load_run": "run.run",
        "record": "harvest.api",
    },
)
