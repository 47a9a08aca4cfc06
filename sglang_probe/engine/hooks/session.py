"""The state of the probe in one scheduler process, and the guard that keeps its faults away from requests."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.capture.taps import Taps, head_columns
from sglang_probe.engine.hooks import policy
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import kept_sets as eviction
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import ForwardPlan, Recorder
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.engine.live.recording import LiveRecording
from sglang_probe.errors import UnsupportedError
from sglang_probe.policy.switches import Switches
from sglang_probe.run import journal
from sglang_probe.run.selection import Selected

if TYPE_CHECKING:
    import torch

    from sglang_probe.engine.hooks.instruments.device_telemetry import AcceleratorTelemetry
    from sglang_probe.engine.hooks.instruments.telemetry import EngineTelemetry

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
        self.dp_rank = 0
        self.records = True
        self.opened = 0
        """Recordings begun in this engine."""
        self.fault: str | None = None
        """Why the probe stopped itself."""
        self.taps: Taps | GraphTaps | None = None
        self.graph_taps: GraphTaps | None = None
        """The taps that are part of recorded graphs: they stay for as long as the engine does."""
        self.heads: dict[str, list[int]] = {}
        """Kept heads and their width at hook points whose rows are per head, once the model is loaded."""
        self.head_numbers: dict[str, list[int]] = {}
        """Which heads these are, where it is not all of them."""
        self.selected = Selected(config.rows, config.hook_points)
        self.telemetry: EngineTelemetry | AcceleratorTelemetry | None = None
        """Set once the model is loaded, if the config asks for it."""
        self.telemetry_layers: list[int] = []
        self.tp_size = 1
        """Ranks that run the model together. Only rank 0 of them records; the taps of all take part in its sums."""
        self.current: ForwardPlan | None = None
        """The forward being launched, from `run_batch` to its return."""
        self.publishing: Any = None
        """The request whose entries the radix tree is about to take."""
        self.forced: tuple[list[int], list[int]] | None = None
        """Batch rows of the forward being launched, and the tokens that they must yield."""
        self.positions: tuple[list[int], list[int]] | None = None
        """Token rows of the forward being launched, and the positions by which they are rotated."""
        self.evictions: eviction.Evictions | None = None
        """The kept sets of this recording."""
        self.evicting: list[eviction.EvictedRow] | None = None
        """Rows of the forward being launched that attend to a kept set."""

    def attach(self, scheduler: Any, *, dp_rank: int, records: bool) -> None:
        """Take note of the scheduler, once it is built.

        Args:
            dp_rank: data-parallel rank of this process: each has its own cache, and its own ledger.
            records: whether this process writes. Others only follow what the recording asks of the engine.
        """
        self._scheduler, self.dp_rank, self.records = scheduler, dp_rank, records
        self._start = policy.started_with(scheduler)

    def open(self) -> None:
        """Set the policy and start recording.

        What the lineage remembers is a multiple of the KV pool: under LRU eviction nothing that can still be matched is
        forgotten; LFU may keep an entry for longer, whose origin is then unknown, never wrong.

        Raises:
            UnsupportedError: the policy cannot be set without a restart, or kept sets are not for this engine.
        """
        c, scheduler = self.config, self._scheduler
        self.evictions = eviction.open_evictions(scheduler, c.kept)
        if c.switches != Switches() or self.opened:
            policy.apply(scheduler, c.switches, self._start, used=self.opened > 0)
        self.opened += 1
        if not self.records:
            return
        page_size, pool_tokens = scheduler.page_size, scheduler.max_total_num_tokens
        forward = row = 0
        if self.live is not None:
            self.writer = self.live
        else:
            self.writer = Writer(c.run, session=c.start, dp_rank=self.dp_rank, part_seconds=c.checkpoint_seconds)
            forward, row = self.writer.forwards_end, self.writer.rows_end
        self.recorder = Recorder(
            self.writer,
            lineage=Lineage(page_size, max(_LINEAGE_PAGES, 4 * pool_tokens // page_size)),
            captures_rows=bool(c.hook_points),
            first_forward=forward,
            first_row=row,
        )

    def reopen(self, config: EngineProbeConfig) -> None:
        """Go on with another recording in the same engine: another run, perhaps another policy.

        Raises:
            UnsupportedError: requests are in flight, or the engine was not started for what `config` needs.
        """
        missing = set(config.features) - set(self.config.features)
        same = all(getattr(config, k) == getattr(self.config, k) for k in ("hook_points", "rows", "telemetry"))
        if missing or not same or self.live is not None or config.live is not None:
            raise UnsupportedError("the engine was started with other hooks than this recording needs")
        self.close()
        if isinstance(self.writer, Writer):
            self.writer.stop()
        # The hooks that are in place stay; a recording that uses fewer of them is none the worse.
        self.config = config.model_copy(
            update={name: getattr(self.config, name) for name in ("forced_outputs", "bypass", "positions", "evictions")}
        )
        self.fault = self.current = self.forced = self.positions = self.evicting = self.publishing = None
        if config.hook_points:
            self.new_taps()
        if self.telemetry is not None:
            self.telemetry.restart()
        self.open()

    def new_taps(self) -> None:
        """Buffers for the hook points, once the heads are known: those of recorded graphs, or empty ones."""
        self.taps = self.graph_taps or Taps(self.config.hook_points, capacity=1024, columns=self.kept_columns())

    def kept_columns(self) -> dict[str, torch.Tensor]:
        """Of hook points that keep some heads only, the columns of these."""
        return {h: head_columns(numbers, self.heads[h][1]) for h, numbers in self.head_numbers.items()}

    def close(self) -> None:
        """Stop recording for good and write everything that is known, forwards in flight included."""
        if self.recorder is not None and self.writer is not None:
            recorder, self.recorder = self.recorder, None
            for plan in recorder.in_flight:
                for transfer in plan.travelling:
                    transfer.wait()
            recorder.drain()
            self.writer.flush()

    @property
    def taps_write(self) -> bool:
        """Whether taps write what they see."""
        in_graphs = self.config.accelerator == "unproved"  # which are captured before the recording opens
        return self.taps is not None and (self.recorder is not None or in_graphs)

    def fail(self, where: str, error: BaseException) -> None:
        """Stop recording for good, loudly. Requests go on."""
        self.recorder = self.taps = self.telemetry = self.current = None
        self.forced = self.positions = self.evicting = self.publishing = None
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
