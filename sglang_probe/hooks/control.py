"""Commands to the probe through SGLang's own `/set_internal_state`, which reaches every scheduler process.

Values are numbers. `probe_close` ends the recording and writes everything that is known; `probe_open: n` begins another
one as `probe-<n>.yaml` says, which lies beside the file that `SGLANG_PROBE` names. The reply is true only if nothing
failed. SGLang hears the first tensor-parallel rank only, which is the one that records.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from sglang_probe.config import load_config
from sglang_probe.hooks import session as probe
from sglang_probe.hooks.config import EngineProbeConfig
from sglang_probe.plugin import CONFIG_VARIABLE

logger = logging.getLogger("sglang_probe")

CLOSE = "probe_close"
OPEN = "probe_open"


def update_handlers(handlers: dict[str, Any], _controller: Any) -> dict[str, Any]:
    """AFTER `SchedulerInternalStateController._update_handlers`: add the probe's keys."""
    from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected, _UpdateHandler

    # Validation may refuse; `apply` may not. So the work is done here, and a failure is a refusal.
    def close(key: str, _value: Any) -> None:
        if probe.active().records and _close() is None:
            raise UpdateRejected(f"{key}: the probe is not recording, or failed; see the scheduler's log")

    def reopen(key: str, value: Any) -> None:
        try:
            probe.active().reopen(load_config(next_config(int(value)), EngineProbeConfig))
        except Exception as e:
            logger.exception("sglang-probe could not begin another recording")
            raise UpdateRejected(f"{key}: {e}") from e

    for key, work in ((CLOSE, close), (OPEN, reopen)):
        handlers[key] = _UpdateHandler(work, lambda _key, _value: None)
    return handlers


def next_config(number: int) -> Path:
    """Where the configuration of the engine's recording `number` lies."""
    return Path(os.environ[CONFIG_VARIABLE]).with_name(f"probe-{number}.yaml")


@probe.guarded
def _close() -> bool:
    session = probe.active()
    if session.live is not None:  # goes on: the current segment is closed, and nobody waits for the disk here
        session.live.ask_flush()
    else:
        session.close()
    return True
