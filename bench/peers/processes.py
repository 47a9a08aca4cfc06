"""A peer in a process of its own, which is stopped while it is not measured: an idle SGLang scheduler spins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from child import MARK

sys.path.append(str(Path(__file__).parents[1]))
from stopped import end_with_parent, signal_all

HERE = Path(__file__).parent


class Running:
    """Started, loaded, and stopped until it is asked.

    Args:
        threads: of its OpenMP at most; None: what the peer does by itself.
    """

    def __init__(self, script: str, python: Path, given: Mapping[str, Any], threads: int | None, log: Path) -> None:
        self._log = log
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        # The driver's own imports, and make, set it.
        env.pop("OMP_NUM_THREADS", None)
        if threads is not None:
            env["OMP_NUM_THREADS"] = str(threads)
        command = [str(python), str(HERE / script), json.dumps(given)]
        with log.open("w") as err:
            # In a session of its own: where the shell that started the driver ends, the kernel would wake a stopped
            # process of the shell's with SIGHUP.
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                env=env,
                cwd=log.parent,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self.loaded = self._answer()
        self._signal(signal.SIGSTOP)

    def ask(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """One harvest.

        Raises:
            RuntimeError: the process ended; the message has the end of its log.
        """
        self._signal(signal.SIGCONT)
        try:
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps(what) + "\n")
            self._child.stdin.flush()
            return self._answer()
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End it."""
        self._signal(signal.SIGCONT)
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(120)

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(MARK):
                return dict(json.loads(line.removeprefix(MARK)))
        self._child.wait()
        raise RuntimeError(f"{self._child.args[1]} ended:\n{self._log.read_text()[-3000:]}")  # type: ignore[index]

    def _signal(self, number: signal.Signals) -> None:
        if self._child.poll() is None:
            signal_all(self._child.pid, number)
