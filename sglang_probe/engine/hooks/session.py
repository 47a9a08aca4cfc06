"""One engine process being recorded: its instruments, its recorder, and the forward pass at hand."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from sglang_probe.engine.hooks import instruments, policy, requests
from sglang_probe.engine.hooks.config import FAULT_FILE, EngineProbeConfig
from sglang_probe.engine.hooks.instruments.base import Instrument
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import ForwardPlan, Recorder
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.engine.live.recording import LiveRecording
from sglang_probe.errors import UnsupportedError
from sglang_probe.policy.switches import Switches
from sglang_probe.run import journal, schema

logger = logging.getLogger("sglang_probe")

Kind = TypeVar("Kind", bound=Instrument)


class Session:
    """Exists from plugin load; `open` is called once the scheduler is built.

    Args:
        kinds: the instruments; by default those that `config` wants.
    """

    def __init__(self, config: EngineProbeConfig, kinds: Iterable[type[Instrument]] | None = None) -> None:
        self.config = config
        self.honoured = instruments.honoured(config)
        """Fields of `Ask` that requests may use."""
        self.instruments = [kind(config) for kind in (instruments.wanted(config) if kinds is None else kinds)]
        self.recorder: Recorder | None = None
        self.writer: Writer | LiveRecording | None = None
        self.live: LiveRecording | None = None
        """Set before `open` if a live server is recorded; takes the place of the writer."""
        self.plan: ForwardPlan | None = None
        """The forward being launched, from `launch` to `launched`."""
        self.publishing: Any = None
        """The request whose entries the radix tree is about to take."""
        self.dp_rank = 0
        self.tp_size = 1
        """Ranks that run the model together. Only rank 0 of them records; the taps of all take part in its sums."""
        self.records = True
        self.opened = 0
        """Recordings begun in this engine."""
        self.fault: str | None = None
        """Why the probe stopped itself."""

    def of(self, kind: type[Kind]) -> Kind | None:
        """The instrument of a kind, if the session has it."""
        return next((i for i in self.instruments if isinstance(i, kind)), None)

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the instruments, once the model is loaded."""
        empty: dict[str, Any] = {"heads": {}, "head_numbers": {}, "telemetry_layers": []}
        return {**empty, **{k: v for i in self.instruments for k, v in i.facts().items()}}

    def attach(self, scheduler: Any, *, dp_rank: int, tp_size: int, records: bool) -> None:
        """Take note of the scheduler, once it is built.

        Args:
            dp_rank: data-parallel rank of this process: each has its own cache, and its own ledger.
            tp_size: ranks that run the model together.
            records: whether this process writes. Others only follow what the recording asks of the engine.
        """
        self._scheduler, self.dp_rank, self.records = scheduler, dp_rank, records
        self.tp_size = tp_size
        self._start = policy.started_with(scheduler)

    def open(self) -> None:
        """Set the policy and start recording.

        What the lineage remembers is a multiple of the KV pool: under LRU eviction nothing that can still be matched is
        forgotten; LFU may keep an entry for longer, whose origin is then unknown, never wrong.

        Raises:
            UnsupportedError: the policy cannot be set without a restart, or an instrument cannot work in this engine.
        """
        c, scheduler = self.config, self._scheduler
        for instrument in self.instruments:
            instrument.open(c, scheduler)
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
            lineage=Lineage(page_size, max(schema.REMEMBERED_PAGES, 4 * pool_tokens // page_size)),
            captures_rows=bool(c.hook_points),
            first_forward=forward,
            first_row=row,
        )

    def reopen(self, config: EngineProbeConfig) -> None:
        """Go on with another recording in the same engine: another run, perhaps another policy.

        Raises:
            UnsupportedError: requests are in flight, or the engine was not started for what `config` needs.
        """
        if not instruments.serves(self.config, config):
            raise UnsupportedError("the engine was started with other hooks than this recording needs")
        self.close()
        if isinstance(self.writer, Writer):
            self.writer.stop()
        # The hooks that are in place stay; a recording that uses fewer of them is none the worse.
        self.config = config.model_copy(update={"asks": self.config.asks})
        self.fault = self.plan = self.publishing = None
        self.open()

    def forget_forward(self) -> None:
        """Whatever runs next is of no request."""
        self.plan = None
        for instrument in self.instruments:
            instrument.drop()

    def launch(self, reqs: Sequence[Any], plan: ForwardPlan) -> None:
        """A forward pass of these requests is about to be launched. Runs inside guarded code."""
        assert self.recorder is not None
        if self.live is not None:
            self.live.names.launch(plan)
        self.recorder.launch(plan)
        self.plan = plan
        asks = requests.asks_of(reqs)
        for instrument in self.instruments:
            instrument.launch(reqs, asks, plan)

    def launched(self, *, replayed: bool) -> None:
        """It is launched. Runs inside guarded code."""
        if self.plan is not None:
            self.plan.graph = replayed
        self.plan = None
        for instrument in self.instruments:
            instrument.launched()

    def end(self, rid: str) -> None:
        """A request ended. Runs inside guarded code."""
        for instrument in self.instruments:
            instrument.end(rid)

    def close(self) -> None:
        """Stop recording for good and write everything that is known, forwards in flight included."""
        if self.recorder is not None and self.writer is not None:
            recorder, self.recorder = self.recorder, None
            for plan in recorder.in_flight:
                for transfer in plan.travelling.values():
                    transfer.wait()
            recorder.drain()
            self.writer.flush()

    @property
    def taps_write(self) -> bool:
        """Whether taps write what they see."""
        in_graphs = self.config.accelerator == "unproved"  # which are captured before the recording opens
        return self.fault is None and (self.recorder is not None or in_graphs)

    def fail(self, where: str, error: BaseException) -> None:
        """Stop recording for good, loudly. Requests go on."""
        self.recorder = self.publishing = None
        self.forget_forward()
        message = f"sglang-probe stopped recording in {where}: {type(error).__name__}: {error}"
        logger.critical(message, exc_info=error)
        self.fault = message
        if self.live is not None:  # closes in its own thread; requests do not wait
            self.live.close(status="incomplete", fault=message, timeout=0)
        try:
            journal.write_text_durably(self.config.run / FAULT_FILE, message + "\n")
        except OSError:
            logger.critical("sglang-probe could not write %s", FAULT_FILE)
