"""A second SGLang plugin, for tests: disables what `PROBE_SABOTAGE` names (`sabotages.py`) in the engine's processes.

Loaded through `PYTHONPATH`, without being installed.
"""

from __future__ import annotations

import os
import sys


def register() -> None:
    what = os.environ.get("PROBE_SABOTAGE")
    if what and "sglang.srt.managers.scheduler" in sys.modules:
        from sabotages import SABOTAGES

        SABOTAGES[what]()
