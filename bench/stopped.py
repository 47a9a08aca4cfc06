"""Processes that are stopped while another one is measured, because an idle SGLang scheduler spins."""

from __future__ import annotations

import ctypes
import signal

import psutil

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends: a stopped one would not notice. SGLang's own processes
    follow theirs alike."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def signal_all(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and to all that it started."""
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        one.send_signal(number)
