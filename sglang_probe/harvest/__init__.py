"""Running an engine over a workload, and writing the run directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_probe.lazy import lazily

if TYPE_CHECKING:
    from sglang_probe.harvest.api import Experiment
    from sglang_probe.harvest.config import HarvestConfig
    from sglang_probe.harvest.experiment import RunSpec, record
    from sglang_probe.harvest.host import EngineHost
    from sglang_probe.harvest.kept_requests import KeptRequest, record_kept
    from sglang_probe.harvest.prepare import Prepared

__all__ = [
    "EngineHost",
    "Experiment",
    "HarvestConfig",
    "KeptRequest",
    "Prepared",
    "RunSpec",
    "record",
    "record_kept",
]

__getattr__ = lazily(
    __name__,
    {
        "EngineHost": "host",
        "Experiment": "api",
        "HarvestConfig": "config",
        "KeptRequest": "kept_requests",
        "Prepared": "prepare",
        "RunSpec": "experiment",
        "record": "experiment",
        "record_kept": "kept_requests",
    },
)
