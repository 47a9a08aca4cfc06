"""The guard that keeps the probe's faults away from requests, and where hooks find the session of their process.

A hook on SGLang does no more than call an observation that is `guarded` (or, inside the model, `tapping`): a fault in
it stops the recording and never the request (design rule 4).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.session import Session

logger = logging.getLogger("sglang_probe")
P = ParamSpec("P")

session: Session | None = None
"""The session of this process, set once by `install`; None while the probe is inert."""


def guarded(observe: Callable[P, Any]) -> Callable[P, Any]:
    """Wrap an observation: a fault in it stops the recording.

    Returns None when the probe is not recording, or when it just failed.
    """

    @functools.wraps(observe)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
        if session is None or session.recorder is None:
            return None
        try:
            return observe(*args, **kwargs)
        except Exception as e:
            session.fail(observe.__qualname__, e)
            return None

    return wrapper


def tapping(write: Callable[P, None]) -> Callable[P, None]:
    """`guarded` for what runs inside the model: taps that belong into a graph are also written while it is captured,
    which is before the recording opens."""

    @functools.wraps(write)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        if session is None or not session.taps_write:
            return
        try:
            write(*args, **kwargs)
        except Exception as e:
            session.fail(write.__qualname__, e)

    return wrapper


def active() -> Session:
    """The session, inside guarded code."""
    assert session is not None
    return session
