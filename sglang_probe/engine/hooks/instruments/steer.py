"""Interventions on the residual stream (`Ask.steer`, and a deployment's on every request), and their isolation.

A hook on each layer that the library has a vector for adds the changes that the forward's plan names, before the taps
of that layer: captured rows of `hook_resid_post` are those after the intervention, which later layers see. Rows of no
intervention are not touched, and a layer that nobody asks for in this forward does nothing.

Entries past the first changed position are those of another model. They are kept apart in the prefix cache, both ways
(`Spec.isolation`): in a namespace, which only requests of the same history share, or by reading what lies before and
publishing nothing. The namespace has a random part that no client knows, so that nobody can name it.

A gate by a probe is decided inside the forward that computes the prompt's last row, after its layer (`gates.py`). Until
then nothing that waits for it is planned; from the next forward on the plan has it, or leaves it out for good.

Under tensor parallelism every rank plans and makes the same changes, to a tensor that each of them holds whole; what
could part them (a decision or a time that each would find for itself) is refused.

If the recording stops, requests in flight go on as they were asked; new ones are refused. If a change itself cannot be
made, the requests that it was for are aborted: half of an intervention is none.
"""

from __future__ import annotations

import json
import logging
import secrets
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang_probe.ask import WHERE, Ask
from sglang_probe.engine.capture.graph_steering import GraphSteering
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.accelerator import check_device
from sglang_probe.engine.hooks.instruments.base import Instrument, forward_batch_of
from sglang_probe.engine.hooks.instruments.budget import Budget
from sglang_probe.engine.hooks.instruments.clamps import Clamping, is_untouched
from sglang_probe.engine.hooks.instruments.gates import Gates
from sglang_probe.engine.hooks.instruments.steer_graphs import graph_steering, refuse_more, refuse_spliced
from sglang_probe.engine.hooks.instruments.steered import Steered, gated, mark, of_length, steered_of
from sglang_probe.engine.ledger.facts import Under
from sglang_probe.engine.releases import release
from sglang_probe.engine.releases.base import Hook, Release
from sglang_probe.errors import ConfigError, LedgerError, UnsupportedError
from sglang_probe.run.hook_points import check_architecture
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.steering.config import told
from sglang_probe.steering.library import Library
from sglang_probe.steering.plan import Rows, rows_of
from sglang_probe.steering.resolve import spec_of
from sglang_probe.steering.spec import Isolation, Spec, joined, layer_of, merged

if TYPE_CHECKING:
    import torch

    from sglang_probe.engine.hooks.config import EngineProbeConfig
    from sglang_probe.engine.ledger.facts import ForwardPlan
    from sglang_probe.steering.apply import Bank

logger = logging.getLogger("sglang_probe")

_UNSTEERED = "_sglang_probe_unsteered"
"""Attribute of a `Req` that is served without the interventions of this hash, until its first launch."""


class Steering(Instrument):
    """See the module."""

    name = "steering"
    field = "steer"
    features = ("rows", "bypass", "steering")
    in_model = True

    @classmethod
    def wanted(cls, config: EngineProbeConfig) -> bool:
        return config.steer is not None

    @classmethod
    def honours(cls, config: EngineProbeConfig) -> str | None:
        return cls.field if cls.field in config.asks else None

    @classmethod
    def hooks(cls, release: Release) -> list[Hook]:
        return release.bypass_hooks()

    @classmethod
    def serves(cls, started: EngineProbeConfig, asked: EngineProbeConfig) -> bool:
        if started.steer is None or asked.steer is None:
            return asked.steer is None and (started.steer is None or not started.steer.deployment)
        return started.steer.without_budget == asked.steer.without_budget

    def __init__(self, config: EngineProbeConfig) -> None:
        super().__init__(config)
        assert config.steer is not None
        self._given = config.steer
        self.of_all = bool(config.steer.deployment or config.steer.clamps)
        self._library: Library | None = None
        self.weight_hash: str | None = None
        """Of the model's files, as they were loaded; None: there are none."""
        self._deployed: Spec | None = None
        """What is done to every request."""
        self._clamping: Clamping | None = None
        """None: the server clamps nothing of its own."""
        self._bank: Bank | None = None
        self._numbers: dict[str, int] = {}
        self._graph: GraphSteering | None = None
        """Set where interventions are part of recorded graphs."""
        self._salt = ""
        self.budget: Budget | None = None
        """None: interventions may cost what they do."""
        self._gates: Gates | None = None
        """None: the library has no probe, or gates cannot be had here."""
        self._running: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        """Requests under interventions, by identity, for as long as SGLang holds them."""
        self._plan: ForwardPlan | None = None
        """The recorded forward at hand, which takes what becomes of the budget."""
        self.passes: dict[int, list[Rows]] = {}
        """By layer, what the forward that is being launched changes."""
        self.changed = 0
        """Rows that were changed, once per layer: for tests and metrics."""

    def attach(self, runner: Any) -> None:
        from sglang_probe.steering.apply import bank_of

        check_device(runner.device)
        check_architecture(type(runner.model).__name__)
        layers = runner.model.model.layers
        self._library = library = Library.open(self._given.library)
        if self._given.hash not in (None, library.hash):
            raise UnsupportedError(
                f"the library {self._given.library} was changed after the recording was prepared", fix="start it again"
            )
        self.weight_hash = weight_hash_of_folder(runner.server_args.model_path)
        library.check(width=runner.model_config.hidden_size, layers=len(layers), weight_hash=self.weight_hash)
        self._clamping = clamping = Clamping.of(self._given.clamps, library, runner)
        # Features of clamps are in no library; directions are.
        own = [] if clamping is None else [c.vector for c in clamping.clamps if c.config.feature is not None]
        entries = [*library.values(), *own]
        self._bank, self._numbers = bank_of(entries, device=runner.device)
        if self._bank is None:
            raise ConfigError(f"the library {self._given.library} has no vector to intervene with")
        self._deployed = spec_of(self._given.deployment, library, where="steer.deployment")
        graphs = guard.active().in_graphs
        if graphs and self._deployed is not None:
            refuse_spliced(self._deployed, "steer.deployment")
        kinds = ("direction", "feature") if graphs else ("direction", "feature", "sae")
        changed = sorted({layer_of(v.card.hook_point) for v in entries if v.card.kind in kinds})
        if graphs:
            self._graph = graph_steering(runner, self._bank, changed, self._given.passes, self._given.fused)
        probes = [v for v in library.values() if v.card.kind == "probe"]
        if probes and self._graph is None and guard.active().tp_size == 1:
            self._gates = Gates(probes, device=runner.device)
            changed = sorted({*changed, *(v.card.layer for v in probes)})
        if clamping is not None and self._gates is None:
            raise UnsupportedError(
                "`clamps` wait for a gate, which is decided on the host of one rank between two forwards",
                fix="serve on the CPU, on one rank and without `accelerator`, or use a `deployment`, which has no gate",
            )
        for layer in changed:
            layers[layer].register_forward_hook(_layer_hook(self, layer), with_kwargs=True)

    def open(self, config: EngineProbeConfig, scheduler: Any) -> None:
        super().open(config, scheduler)
        self._salt = secrets.token_hex(8)
        steer = config.steer
        if steer is not None and steer.budget_ms is not None and guard.active().tp_size > 1:
            raise UnsupportedError(
                "`budget_ms` under tensor parallelism: each rank measures for itself, and they would part",
                fix="leave it out",
            )
        self.budget = None if steer is None or steer.budget_ms is None else Budget(steer)

    def admit(self, ask: Ask, req: Any) -> None:
        assert self._library is not None
        weights = guard.active().weights[-1]["number"]
        if ask.steer and weights:
            raise ConfigError(f"{WHERE}.steer: the weights were updated, and the library is of those before")
        own = spec_of(ask.steer or (), self._library, where=f"{WHERE}.steer")
        clamping = self._clamping
        clamped = None if clamping is None else clamping.now(updated=bool(weights))
        spec = merged(clamped, own) if clamped is not None else joined(self._deployed, own)
        prompt_len = len(req.origin_input_ids)
        onset = None if spec is None else spec.onset(prompt_len)
        if spec is None or onset is None:
            return
        if self._graph is not None:
            refuse_spliced(spec, f"{WHERE}.steer")
            refuse_more(spec, self._graph.passes)
        if self.budget is not None and not self.budget.admits():
            if self.budget.refuses:
                raise ConfigError(f"{WHERE}.steer: {self.budget.refusal()}")
            setattr(req, _UNSTEERED, spec.id)
            return
        isolation = spec.isolation(prompt_len)
        if self._deployed is not None:  # what everybody runs under is shared
            isolation = Isolation(spec.history(prompt_len), None)
        told = json.dumps(spec.to_json())
        if own is None and clamping is not None and clamped is not None:
            clamping.wait(req, prompt_len)
            self._running[id(req)] = req
            return
        if spec.probe is None:
            mark(req, Steered(spec, Under(spec.id, onset, prompt_len, told), isolation, prompt_len))
        elif self._gates is not None:
            mark(req, gated(spec, prompt_len, told, isolation))
        else:
            where = "under tensor parallelism" if guard.active().tp_size > 1 else "on an accelerator"
            raise ConfigError(
                f"{WHERE}.steer: a gate by a probe is decided on the host of one rank, between two forwards, and this "
                f"engine runs {where}"
            )
        if isolation.namespace is not None:
            req.extra_key = f"{req.extra_key or ''}|steer:{self._salt}:{isolation.namespace}"
        else:
            req.skip_radix_cache_insert = True
        self._running[id(req)] = req

    def read_limit(self, ask: Ask, req: Any) -> int | None:
        steered = steered_of(req)
        return None if steered is None else steered.isolation.read_limit

    def launch(self, reqs: Sequence[Any], asks: Sequence[Ask], plan: ForwardPlan) -> None:
        self.prepare(reqs, plan.starts, plan.ends, plan)
        if self.budget is not None:
            self._tell_of_budget(reqs, plan)
        for i, req in enumerate(reqs):
            if (s := steered_of(req)) is not None:
                if s.under is not None:
                    plan.under[i] = s.under
                if s.gate is not None and s.gate.decision is not None:
                    plan.gates[i] = s.gate.decision

    def prepare(
        self, reqs: Sequence[Any], starts: Sequence[int], ends: Sequence[int], plan: ForwardPlan | None = None
    ) -> None:
        """Which rows the coming forward changes, and which it scores; also of a forward that nobody records."""
        self.over()
        steered = [steered_of(req) for req in reqs]
        if not any(s is not None for s in steered):
            return
        began = self._began()
        for i, (req, s) in enumerate(zip(reqs, steered, strict=True)):
            if s is not None and (length := len(req.origin_input_ids)) != s.prompt_len:
                # `--allow-auto-truncate`, or SGLang refused it: positions may be those of another prompt.
                if s.of_server and self._clamping is not None:
                    self._clamping.wait(req, length)
                    steered[i] = steered_of(req)
                    continue
                steered[i] = of_length(s, length)
                if steered[i] is None:
                    self._end(req, f"SGLang cut its prompt of {s.prompt_len} tokens to {length}")
                mark(req, steered[i])
        if self._gates is not None:
            for req in self._gates.expect(reqs, steered, starts, ends, plan):
                if self._clamping is not None and is_untouched(req):
                    self._clamping.missed(req)  # it asked for nothing
                else:
                    self._end(req, "its gate was not decided before the tokens that wait for it")
        lengths = [0 if s is None else s.prompt_len for s in steered]
        self.passes = rows_of(starts, ends, lengths, [None if s is None else s.spec for s in steered], self._numbers)
        self._spent(began)

    def _tell_of_budget(self, reqs: Sequence[Any], plan: ForwardPlan) -> None:
        assert self.budget is not None
        for req, rid in zip(reqs, plan.rids, strict=True):
            if (asked := getattr(req, _UNSTEERED, None)) is not None:
                delattr(req, _UNSTEERED)
                self.budget.unsteered(rid, asked)
        plan.budget += self.budget.take()
        self._plan = plan

    def _began(self) -> float:
        return 0.0 if self.budget is None else self.budget.clock()

    def _spent(self, began: float) -> None:
        if self.budget is not None:
            self.budget.spend(began)

    def load(self, forward_batch: Any) -> None:
        """The coming forward is of this batch: fill what graphs read, on the forward's stream."""
        if self._graph is None:
            return
        began = self._began()
        try:
            self._graph.load(self.passes, len(forward_batch.input_ids))
        except Exception as e:
            self._stop(e)
        if self.passes:
            self._spent(began)

    def launched(self) -> None:
        self.over()

    def over(self) -> None:
        """Whatever runs next is of no request."""
        self.passes = {}
        if self._gates is not None:
            self._gates.forget()
        if self.budget is not None:
            self.budget.forward()
            if self._plan is not None:  # one that is in flight is written later
                self._plan.budget += self.budget.take()
                self._plan = None

    def change(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Make the changes of a layer, then decide the gates that read there. Inside the model.

        Raises:
            LedgerError: the layer has fewer rows than the plan. UnsupportedError: it has no residual to add to.
        """
        from sglang_probe.steering.apply import add_rows, changes

        assert self._bank is not None
        forward_batch = forward_batch_of(args, kwargs)
        x_ND: torch.Tensor = release().residual(forward_batch, output)
        to_ND: torch.Tensor = release().changeable_residual(forward_batch, output)
        if self._graph is not None:
            self._graph.apply(layer, x_ND, to_ND)
            return
        if passes := self.passes.get(layer):
            last = max(int(p.row.max()) for p in passes)
            if last >= len(x_ND):
                raise LedgerError(f"layer {layer} has {len(x_ND)} rows, and row {last} is to be changed")
            rows, change_RD = changes(x_ND, passes, self._bank)
            add_rows(to_ND, rows, change_RD)
            self.changed += len(rows)
        if self._gates is not None and self._gates.reads(layer):
            self._gates.decide(layer, release().residual(forward_batch, output) if passes else x_ND)

    def broken(self, error: Exception) -> None:
        """A change could not be made: the requests under interventions end, and say why."""
        self.over()
        if self._clamping is not None:
            self._clamping.stop(f"a change could not be made: {error}")
        for req in self._running.values():
            if is_untouched(req):
                mark(req, None)  # it asked for nothing
            else:
                self._end(req, str(error))
        self._running.clear()

    def _end(self, req: Any, why: str) -> None:
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        req.skip_radix_cache_insert = True
        if req.to_finish is None and not req.finished():
            req.to_finish = FINISH_ABORT(f"sglang-probe could not intervene as this request asks: {why}")

    @property
    def deployed_id(self) -> str | None:
        """Hash of what is done to every request."""
        return None if self._deployed is None else self._deployed.id

    def library(self) -> tuple[str, str] | None:
        return None if self._library is None else ("steer", self._library.hash)

    def acts(self, layer: int) -> bool:
        """Whether a layer has anything to do in this forward. What is recorded into graphs always does the same."""
        return self._graph is not None or layer in self.passes or (self._gates is not None and self._gates.reads(layer))

    def _stop(self, error: Exception) -> None:
        self.broken(error)
        if guard.session is not None and guard.session.recorder is not None:
            guard.session.fail("steering", error)
        else:
            logger.exception("sglang-probe could not intervene", exc_info=error)

    def status(self) -> dict[str, Any]:
        budget = {} if self.budget is None else {"steering": self.budget.status()}
        return budget if self._clamping is None else {**budget, "clamps": self._clamping.status()}

    def facts(self) -> dict[str, Any]:
        clamps = () if self._clamping is None else self._clamping.clamps
        return {"steer": None if self._library is None else told(self._given, self._library, clamps)}


def steering_of_session() -> Steering | None:
    """The instrument of this process, also while nothing is recorded; None: it has none."""
    return None if guard.session is None else guard.session.of(Steering)


def _layer_hook(steering: Steering, layer: int) -> Callable[..., None]:
    def intervene(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not steering.acts(layer):
            return
        began = steering._began()
        try:
            steering.change(layer, args, kwargs, output)
        except Exception as e:
            steering._stop(e)
        if steering.passes or steering._graph is None:  # graphs do the same in forwards of nobody
            steering._spent(began)

    return intervene
