"""The state of the probe in one scheduler process, and the guard that keeps its faults away from requests."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec

from sglang_probe.capture import journal
from sglang_probe.capture.taps import Taps
from sglang_probe.capture.writer import Writer
from sglang_probe.hooks.config import EngineProbeConfig
from sglang_probe.ledger.lineage import Lineage
from sglang_probe.ledger.recorder import ForwardPlan, Recorder
from sglang_probe.live.recording import LiveRecording

logger = logging.getLogger("sglang_probe")
P = ParamSpec("P")

FAULT_FILE = "fault.txt"
"""Written into the run directory when the probe stopped itself; its content says why."""


_LINEAGE_PAGES = 1 << 18
"""Pages that the lineage remembers at least, in each of two generations: about 30 MB."""


class Session:
    """One engine process being recorded. Exists from plugin load; `open` is called once the scheduler is built."""

    def __init__(self, config: EngineProbeConfig) -> None:
        self.config = config
        self.recorder: Recorder | None = None
        self.writer: Writer | LiveRecording | None = None
        self.live: LiveRecording | None = None
        """Set before `open` if a live server is recorded; takes the place of the writer."""
        self.fault: str | None = None
        """Why the probe stopped itself."""
        self.taps: Taps | None = None
        self.tp_size = 1
        """Ranks that run the model together. Only rank 0 of them records; the taps of all take part in its sums."""
        self.current: ForwardPlan | None = None
        """The forward being launched, from `run_batch` to its return."""
        self.publishing: Any = None
        """The request whose entries the radix tree is about to take."""
        self.forced: tuple[list[int], list[int]] | None = None
        """Batch rows of the forward being launched, and the tokens that they must yield."""

    def open(self, *, page_size: int, pool_tokens: int, dp_rank: int = 0) -> None:
        """Start recording.

        Args:
            dp_rank: data-parallel rank of this process: each has its own cache, and its own ledger.
            page_size, pool_tokens: of SGLang's KV pool. What the lineage remembers is a multiple of the pool: under
                LRU eviction nothing that can still be matched is forgotten; LFU may keep an entry for longer, whose
                origin is then unknown, never wrong.
        """
        c = self.config
        forward = row = 0
        if self.live is not None:
            self.writer = self.live
        else:
            self.writer = Writer(c.run, session=c.session, dp_rank=dp_rank, part_seconds=c.checkpoint_seconds)
            forward, row = self.writer.forwards_end, self.writer.rows_end
        self.recorder = Recorder(
            self.writer,
            lineage=Lineage(page_size, max(_LINEAGE_PAGES, 4 * pool_tokens // page_size)),
            captures_rows=bool(c.hook_points),
            first_forward=forward,
            first_row=row,
        )

    def close(self) -> None:
        """Stop recording for good and write everything that is known, forwards in flight included."""
        if self.recorder is not None and self.writer is not None:
            recorder, self.recorder = self.recorder, None
            recorder.drain()
            self.writer.flush()

    def fail(self, where: str, error: BaseException) -> None:
        """Stop recording for good, loudly. Requests go on."""
        self.recorder = self.taps = self.current = self.forced = self.publishing = None
        message = f"sglang-probe stopped recording in {where}: {type(error).__name__}: {error}"
        logger.critical(message, exc_info=error)
        self.fault = message
        if self.live is not None:  # closes in its own thread; requests do not wait
            self.live.close(status="incomplete", fault=message, timeout=0)
        try:
            journal.write_text_durably(self.config.run / FAULT_FILE, message + "\n")
        except OSError:
            logger.critical("sglang-probe could not write %s", FAULT_FILE)


session: Session | None = None
"""The session of this process; None while the probe is inert."""


def guarded(observe: Callable[P, Any]) -> Callable[P, Any]:
    """Wrap an observation so that a fault in it stops the recording, never the request (design rule 4).

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


def active() -> Session:
    """The session, inside guarded code."""
    assert session is not None
    return session
