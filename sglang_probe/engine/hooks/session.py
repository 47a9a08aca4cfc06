"""One engine process being recorded: its instruments, its recorder, and the forward pass at hand."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from sglang_probe.engine.hooks import instruments, policy, requests
from sglang_probe.engine.hooks.certified import certified
from sglang_probe.engine.hooks.config import CONFIG_VARIABLE, CRASHED, ENGINE_FILE, EngineProbeConfig, fault_file
from sglang_probe.engine.hooks.instruments.base import Instrument
from sglang_probe.engine.hooks.resolved import resolved
from sglang_probe.engine.ledger.facts import ForwardPlan, Sink
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.engine.live.recording import LiveRecording
from sglang_probe.engine.live.stops import reason_of
from sglang_probe.errors import UnsupportedError
from sglang_probe.policy.switches import Switches
from sglang_probe.run import journal, schema
from sglang_probe.run.hook_points import has_patterns

logger = logging.getLogger("sglang_probe")

Kind = TypeVar("Kind", bound=Instrument)

_WEIGHTS = 100
"""Updates of the weights that are told at least."""


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
        self._forwards_before = 0
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
        self._device = "cpu"
        """The model's, once it is loaded."""
        self.in_graphs = config.simulated_graphs
        """Whether rows leave the model through graphs, whose taps are captured before the recording opens."""
        self.certificate: dict[str, Any] | None = None
        """Under which rows, telemetry and interventions are made here; None: nothing of it needs one."""
        self.fault: str | None = None
        """Why the probe stopped itself."""
        self.epoch = 0
        """Of the live recording, the epoch that `recorder` belongs to."""
        self.weights: list[dict[str, Any]] = [{"number": 0, "how": "model_path"}]
        """What the engine's weights were, by the number of updates before."""

    def of(self, kind: type[Kind]) -> Kind | None:
        """The instrument of a kind, if the session has it."""
        return next((i for i in self.instruments if isinstance(i, kind)), None)

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the instruments, once the model is loaded."""
        empty: dict[str, Any] = {"heads": {}, "head_numbers": {}, "telemetry_layers": []}
        return {**empty, **{k: v for i in self.instruments for k, v in i.facts().items()}}

    def of_model(self, model: Any, device: str = "cpu") -> None:
        """Take note of the model, once it is loaded: patterns of hook points become those of its layers."""
        self._device = device
        self.in_graphs = self.in_graphs or device != "cpu"
        if has_patterns([*self.config.hook_points, *self.config.rows.at]):
            self.config = self.config.of_layers(len(model.model.layers))
            for instrument in self.instruments:
                instrument.config = self.config

    def attach(self, scheduler: Any, server_args: Any, *, dp_rank: int, tp_size: int, records: bool) -> None:
        """Take note of the scheduler, once it is built.

        Args:
            dp_rank: data-parallel rank of this process: each has its own cache, and its own ledger.
            tp_size: ranks that run the model together.
            records: whether this process writes. Others only follow what the recording asks of the engine.

        Raises:
            UnsupportedError: nothing proves that what is asked is right here.
        """
        self._scheduler, self._server_args, self.dp_rank, self.records = scheduler, server_args, dp_rank, records
        self.tp_size = tp_size
        self._start = policy.started_with(scheduler)
        self.certificate = certified(self.config, self._device, self.in_force)

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
        self.set_policy()
        self.opened += 1
        if not self.records:
            return
        page_size, pool_tokens = scheduler.page_size, scheduler.max_total_num_tokens
        forward = row = 0
        sink: Sink
        if self.live is not None:
            # Of another epoch: what the recorder before this one knew is forgotten, its numbers are not given again.
            forward = self._forwards_before
            self.writer, sink, self.epoch, row = self.live, self.live.sink(), self.live.epoch, self.live.totals.rows
        else:
            writer = Writer(c.run, session=c.start, dp_rank=self.dp_rank, part_seconds=c.checkpoint_seconds)
            self.writer, sink, forward, row = writer, writer, writer.forwards_end, writer.rows_end
            self._tell()
        lineage = Lineage(page_size, max(schema.REMEMBERED_PAGES, 4 * pool_tokens // page_size))
        if self.live is not None:
            self.live.names.remembered = lineage.remembers
        self.recorder = Recorder(
            sink,
            lineage=lineage,
            captures_rows=bool(c.hook_points),
            first_forward=forward,
            first_row=row,
            tolerant=self.live is not None,
            sliding=len(getattr(scheduler.tree_cache, "components", ())) > 1,
        )

    def follow(self) -> None:
        """Follow the live recording, before a launch: it may have stopped, and it may have begun again."""
        live = self.live
        if live is None or not self.records:
            return
        if live.stops.fault is not None:
            if self.recorder is not None:
                self._let_go()
            self.fault = live.stops.fault
        elif self.epoch != live.epoch:
            if self.recorder is not None:
                self._let_go()
            self.fault = None
            self.open()

    def weights_changed(self, how: str, version: str | None, path: str | None) -> None:
        """The engine's weights are others from the next launch on.

        Args:
            how: the way of the update. version: SGLang's name of the weights. path: where they come from, if said.
        """
        entry = {"number": int(self.weights[-1]["number"]) + 1, "how": how, "version": version, "path": path}
        self.weights = [*self.weights[-_WEIGHTS:], entry]
        if self.live is not None:
            self.live.weights_changed(entry)
        elif self.opened and self.records:
            self._tell()

    def _tell(self) -> None:
        """Say what is in force in this engine, for the manifest of a harvest (`harvest/engine.py`)."""
        if self.dp_rank == 0:
            told = {"server_resolved": self.in_force(), "weights": self.weights, **self.proved()}
            journal.write_text_durably(self.config.run / ENGINE_FILE, json.dumps(told, default=str))

    def proved(self) -> dict[str, Any]:
        """What manifests say of proofs: the certificate, and the graphs that were checked; nothing on a CPU."""
        told = {"certificate": self.certificate, "graphs_checked": self.facts().get("graphs_checked")}
        return {name: value for name, value in told.items() if value is not None}

    def set_policy(self) -> None:
        """Set what the configuration switches in the idle scheduler.

        Raises:
            UnsupportedError: it cannot be set without a restart.
        """
        if self.opened and self.live is not None:
            return  # a live recording that begins again: requests are in flight, and its policy is in force
        if self.config.switches != Switches() or self.opened:
            policy.apply(self._scheduler, self.config.switches, self._start, used=self.opened > 0)

    def in_force(self) -> dict[str, Any]:
        """The server arguments as they are in force now."""
        return resolved(self._scheduler, self._server_args)

    def reopen(self, config: EngineProbeConfig) -> None:
        """Go on with another recording in the same engine: another run, perhaps another policy.

        Raises:
            UnsupportedError: requests are in flight, or the engine was not started for what `config` needs.
        """
        if not instruments.serves(self.config, config):
            raise UnsupportedError("the engine was started with other hooks than this recording needs")
        self.close()
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
        plan.weights = int(self.weights[-1]["number"])
        self.recorder.launch(plan)
        self._forwards_before = plan.forward_id + 1
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
        stopped = self.live is not None and self.live.stops.fault is not None
        if self.recorder is not None and self.writer is not None and not stopped:
            recorder, self.recorder = self.recorder, None
            for plan in recorder.in_flight:
                for transfer in plan.travelling.values():
                    transfer.wait()
            recorder.drain()
            self.writer.flush()
            if isinstance(self.writer, Writer):
                self.writer.stop()
            for instrument in self.instruments:
                instrument.close()
        elif self.live is not None:  # which has stopped
            self.live.close()

    def crashed(self, error: BaseException) -> None:
        """The scheduler ends by an error of its own: write what is known, and say why.

        A forward pass in flight may be the one that failed: it counts as never run.
        """
        in_flight = 0 if self.live is None else len(self.live.totals.active)
        closed = self.recorder is None and self.fault is None
        self._let_go()
        if isinstance(error, KeyboardInterrupt):
            self.fault = f"the server was ended by Ctrl-C with {in_flight} requests in flight"
        else:
            self.fault = f"{CRASHED}: {type(error).__name__}: {error}"
        if self.live is not None:
            if isinstance(error, KeyboardInterrupt) and not in_flight:
                self.live.close()
            else:
                self.live.close(status="interrupted", fault=self.fault)
        elif isinstance(self.writer, Writer):
            # First: what follows takes time, and who waits may end this process. A closed run is whole whatever comes
            # after: of several ranks, one may see the others end before it is told to.
            self._tell_fault(self.fault, of_run=not closed)
            with suppress(OSError, TimeoutError):
                self.writer.flush(timeout=20)

    @property
    def taps_write(self) -> bool:
        """Whether taps write what they see."""
        return self.fault is None and (self.recorder is not None or self.in_graphs)

    def _let_go(self) -> None:
        """Record nothing any more; requests go on."""
        self.recorder = self.publishing = None
        self.forget_forward()

    def fail(self, where: str, error: BaseException) -> None:
        """Stop recording, loudly: a harvest for good, a live server until the next segment can be opened."""
        self._let_go()
        message = f"sglang-probe stopped recording in {where}: {type(error).__name__}: {error}"
        logger.critical(message, exc_info=error)
        self.fault = message
        if self.live is not None:  # its own thread does the rest; requests do not wait
            self.live.stop(message, reason_of(error), self.epoch)
            return
        self._tell_fault(message)

    def _tell_fault(self, fault: str, *, of_run: bool = True) -> None:
        """Leave a word to who started this engine: in the run, or beside the configuration if that disk is full."""
        folders = [self.config.run] if of_run else []
        if self.config.live is None and CONFIG_VARIABLE in os.environ:
            folders.append(Path(os.environ[CONFIG_VARIABLE]).parent)
        for path in (folder / fault_file(self.config.replica) for folder in folders):
            try:
                journal.write_text_durably(path, fault + "\n")
                return
            except OSError:
                logger.critical("sglang-probe could not write %s", path)
