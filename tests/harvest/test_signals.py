"""SIGTERM and SIGHUP act as Ctrl-C, also after SGLang has set its own handlers; a failed process is told in words."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from sglang_probe.harvest.death import Children, end_of

AS_SGLANG_DOES = """
import asyncio, os, signal, sys, uvloop
from sglang_probe.harvest import signals
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
loop = asyncio.new_event_loop()
handlers = signals.EngineSignals()
handlers.keep()
signal.signal(signal.SIGQUIT, handlers.arguments()["custom_sigquit_handler"])
for s in (signal.SIGTERM, signal.SIGQUIT):
    loop.add_signal_handler(s, lambda: print("swallowed", flush=True))
async def serve(*numbers):
    for number in numbers:
        loop.call_later(0.05, os.kill, os.getpid(), number)
        await asyncio.sleep(0.2)
    return "went on"
"""


def _by_default() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # whoever started the tests may ignore them (`nohup`)
        signal.signal(number, signal.SIG_DFL)


def run(code: str, before: str = AS_SGLANG_DOES) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=_by_default,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_reach_what_is_being_served(number: signal.Signals) -> None:
    done = run(
        "handlers.restore(loop)\n"
        f"try: print(loop.run_until_complete(serve({int(number)})))\n"
        "except KeyboardInterrupt as e: print('closed', repr(str(e)), signals.received())\n"
        "handlers.give_back(); print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    )
    said = "''" if number == signal.SIGINT else f"'ended by {number.name}'"
    received = None if number == signal.SIGINT else int(number)
    assert done.stdout.splitlines() == [f"closed {said} {received}", "True"], done.stderr


def test_without_it_sglang_swallows_them() -> None:
    """Negative control."""
    assert run("print(loop.run_until_complete(serve(15)))").stdout.splitlines() == ["swallowed", "went on"]


def test_a_failed_process_is_noted_and_ends_nothing() -> None:
    done = run("handlers.restore(loop); print(loop.run_until_complete(serve(3)), handlers.child_failed)")
    assert done.stdout.splitlines() == ["went on True"], done.stderr


def test_while_a_run_is_closed_the_first_repeat_is_answered_and_the_second_ends_it() -> None:
    done = run(
        "import os\n"
        "with signals.as_interrupts():\n"
        "    try:\n"
        "        with signals.closing('runs/x'):\n"
        "            os.kill(os.getpid(), signal.SIGINT); print('goes on', flush=True)\n"
        "            os.kill(os.getpid(), signal.SIGTERM); print('too far')\n"
        "    except KeyboardInterrupt as e: print('ended', e)\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)",
        before="import signal\nfrom sglang_probe.harvest import signals\n",
    )
    assert done.stdout.splitlines() == ["goes on", "ended ended by SIGTERM", "True"], done.stderr
    assert "closing runs/x; once more ends at once" in done.stderr


def test_handlers_of_the_user_and_ignored_signals_stay() -> None:
    done = run(
        "import os\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('mine', flush=True))\n"
        "with signals.as_interrupts(), signals.closing('x'):\n"
        "    os.kill(os.getpid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGTERM)\n",
        before="import signal\nfrom sglang_probe.harvest import signals\n",
    )
    assert (done.stdout, done.stderr) == ("mine\n", "")


@pytest.mark.parametrize(
    ("exit_code", "words", "fix"),
    [
        (-9, "killed by SIGKILL", "ran out of memory"),
        (-11, "killed by SIGSEGV", "--resume"),
        (3, "exit code 3", "--resume"),
        (None, "does not answer", "watchdog_timeout"),
    ],
)
def test_how_an_engine_ended_is_told_in_words(exit_code: int | None, words: str, fix: str) -> None:
    end = end_of(exit_code)
    assert words in end.words
    assert fix in end.fix


def test_the_first_process_that_ended_is_the_one_that_is_told() -> None:
    class Process:
        def __init__(self, exitcode: int | None) -> None:
            self.exitcode = exitcode

        def is_alive(self) -> bool:
            return self.exitcode is None

    assert Children([Process(None)]).ended() is None
    found = Children([Process(None), Process(-9)]).wait_for_end()
    assert "SIGKILL" in found.words
    assert "waits 300 s for a forward pass here" in Children([Process(None)], 300).wait_for_end(0).words
