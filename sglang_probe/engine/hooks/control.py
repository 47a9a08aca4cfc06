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
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.config import CONFIG_VARIABLE, EngineProbeConfig
from sglang_probe.errors import ProbeError

logger = logging.getLogger("sglang_probe")

CLOSE = "probe_close"
OPEN = "probe_open"
KEYS = (CLOSE, OPEN)


class Refused(Exception):
    """A command was not carried out; the message says why, and is logged by SGLang or the adapter."""


def carry_out(key: str, value: Any) -> None:
    """Do what the probe's `key` says. Called by the release's own handler of `/set_internal_state`.

    Raises:
        Refused: it could not be done.
    """
    if key == CLOSE and (live := guard.active().live) is not None:
        if live.stops.fault is not None:
            raise Refused(f"nothing is recorded now: {live.stops.fault}")
        live.ask_flush()  # nobody waits for the disk here
        return
    if key == CLOSE:
        if guard.active().records and _close() is None:
            raise Refused("the probe is not recording, or failed; see the scheduler's log")
        return
    try:
        guard.active().reopen(load_config(next_config(int(value)), EngineProbeConfig))
    except ProbeError as e:  # the message is made for readers; the harvest asks again while requests are in flight
        logger.error("sglang-probe could not begin another recording: %s", e)
        raise Refused(str(e)) from e
    except Exception as e:
        logger.exception("sglang-probe could not begin another recording")
        raise Refused(str(e)) from e


def next_config(number: int) -> Path:
    """Where the configuration of the engine's recording `number` lies."""
    return Path(os.environ[CONFIG_VARIABLE]).with_name(f"probe-{number}.yaml")


@guard.guarded
def _close() -> bool:
    guard.active().close()
    return True
