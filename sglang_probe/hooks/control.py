"""Commands to the probe through SGLang's own `/set_internal_state`, which reaches every scheduler process.

Keys: `probe_close` ends the recording and writes everything that is known. The reply is true only if nothing failed.
"""

from __future__ import annotations

from typing import Any

from sglang_probe.hooks import session as probe

CLOSE = "probe_close"


def update_handlers(handlers: dict[str, Any], _controller: Any) -> dict[str, Any]:
    """AFTER `SchedulerInternalStateController._update_handlers`: add the probe's keys."""
    from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected, _UpdateHandler
    from sglang.srt.runtime_context import get_parallel

    def validate(key: str, _value: Any) -> None:
        # Validation may refuse; `apply` may not. So the work is done here, and a failure is a refusal.
        # SGLang hears the first tensor-parallel rank only, which is the one that records.
        if get_parallel().tp_rank == 0 and _close() is None:
            raise UpdateRejected(f"{key}: the probe is not recording, or failed; see the scheduler's log")

    handlers[CLOSE] = _UpdateHandler(validate, lambda _key, _value: None)
    return handlers


@probe.guarded
def _close() -> bool:
    session = probe.active()
    if session.live is not None:  # goes on: the current segment is closed, and nobody waits for the disk here
        session.live.ask_flush()
    else:
        session.close()
    return True
