"""SIGTERM and SIGHUP act as Ctrl-C: what is being recorded is closed, and `--resume` finishes it.

SGLang's engine installs handlers of its own in the process that starts it. On SIGTERM they wait for every request to
end (`tokenizer_manager.SignalHandler`), and on SIGQUIT, which its processes send when one of them fails, they kill this
process and all others at once: nobody is left to say why. `EngineSignals` puts back what is set here.

Handlers of the user's own stay, and so does a signal that is ignored (`nohup`).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGHUP)

_users = 0
_before: dict[int, Any] = {}
_received: int | None = None
_closing: str | None = None
_asked = 0
_child_failed = False


class Ended(KeyboardInterrupt):
    """This process was asked to end by a signal. A `KeyboardInterrupt`, because event loops pass those on at once."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def received() -> int | None:
    """The signal that this process was asked to end by, if it was."""
    return _received


@contextmanager
def as_interrupts() -> Iterator[None]:
    """Meanwhile SIGTERM and SIGHUP raise `Ended` in the main thread."""
    _install()
    try:
        yield
    finally:
        _remove()


@contextmanager
def closing(what: str) -> Iterator[None]:
    """Meanwhile a first Ctrl-C, SIGTERM or SIGHUP is answered with a sentence; the second ends the block."""
    global _closing, _asked
    _install()
    _closing, _asked = what, 0
    try:
        yield
    finally:
        _closing = None
        _remove()


class EngineSignals:
    """The handlers of this process while an engine of SGLang runs: those of `as_interrupts`, and for SIGQUIT one that
    only notes it. Without effect outside the main thread, where SGLang sets none either."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] | None = None

    @property
    def child_failed(self) -> bool:
        """Whether a process of the engine said that it failed."""
        return self._kept is not None and _child_failed

    def keep(self) -> None:
        """Before the engine is started."""
        global _child_failed
        if _in_main_thread():
            _install()
            _child_failed = False
            self._kept = {s: signal.getsignal(s) for s in (*ENDING, signal.SIGQUIT)}
            logging.getLogger("sglang.srt.entrypoints.engine").addFilter(_not_of_the_handler)

    def arguments(self) -> dict[str, Any]:
        """Server arguments that leave SIGQUIT to us while the engine starts."""
        return {"custom_sigquit_handler": note_failed_child}

    def restore(self, loop: Any) -> None:
        """Once it is started: take back what SGLang set on its event loop."""
        if self._kept is None:
            return

        async def take_back() -> None:  # uvloop does nothing outside a running loop, and says nothing
            for s in (signal.SIGTERM, signal.SIGQUIT):
                loop.remove_signal_handler(s)

        loop.run_until_complete(take_back())
        for s in ENDING:
            signal.signal(s, self._kept[s])
        signal.signal(signal.SIGQUIT, note_failed_child)

    def give_back(self) -> None:
        """The engine has ended."""
        kept, self._kept = self._kept, None
        if kept is not None:
            if _in_main_thread():
                signal.signal(signal.SIGQUIT, kept[signal.SIGQUIT])
            _remove()


def note_failed_child(_number: int, _frame: FrameType | None) -> None:
    """Handler of SIGQUIT in the place of SGLang's. Of this module, because SGLang sends it to its processes by name."""
    global _child_failed
    _child_failed = True


def _install() -> None:
    global _users
    _users += 1
    if _users == 1 and _in_main_thread():
        defaults = (signal.SIG_DFL, signal.default_int_handler)
        ours = [s for s in (signal.SIGINT, *ENDING) if signal.getsignal(s) in defaults]
        _before.update({s: signal.signal(s, _handle) for s in ours})


def _remove() -> None:
    global _users
    _users -= 1
    if _users == 0 and _in_main_thread():
        for number, handler in _before.items():
            signal.signal(number, handler)
        _before.clear()


def _handle(number: int, _frame: FrameType | None) -> None:
    global _asked, _received
    if _closing is not None:
        _asked += 1
        if _asked == 1:
            # Not `print`: the block may be in the middle of one.
            os.write(2, f"\nclosing {_closing}; once more ends at once, and keeps what is durable\n".encode())
            return
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    _received = number
    raise Ended(number)


def _not_of_the_handler(record: logging.LogRecord) -> bool:
    """SGLang reports a handler that is not its own as an error."""
    return not str(record.msg).startswith("Using custom SIGQUIT handler")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
