"""Decode rows that a live monitor reads: chosen as a forward is launched, copied after their layer, and no more.

What is read of them, and what is said of requests, is done on the writer's thread (`engine/live/monitor.py`). A layer
without a chosen row in this forward does nothing. Requests under interventions of their own are not read; those of a
deployment are, because everybody runs under it.

A fault here turns the monitor off, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.base import Forward, Instrument, forward_batch_of
from sglang_probe.engine.hooks.instruments.steer import Steering
from sglang_probe.engine.ledger.facts import ForwardPlan, Watched
from sglang_probe.engine.releases import release
from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.monitor.config import check_projections
from sglang_probe.run.hook_points import check_architecture
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.steering.library import Library, check_vector
from sglang_probe.steering.spec import layer_of

if TYPE_CHECKING:
    import torch

    from sglang_probe.engine.hooks.config import EngineProbeConfig
    from sglang_probe.engine.live.monitor import LiveMonitor
    from sglang_probe.monitor.stored import StoredProfile, Watch

logger = logging.getLogger("sglang_probe")

_READ = "_sglang_probe_monitored"
"""Attribute of a `Req`: rows of it that were read."""

Array = np.ndarray[Any, Any]


class Watching(Instrument):
    """See the module."""

    name = "monitor"
    features = ("rows",)
    in_model = True

    @classmethod
    def wanted(cls, config: EngineProbeConfig) -> bool:
        return config.monitor is not None

    @classmethod
    def serves(cls, started: EngineProbeConfig, asked: EngineProbeConfig) -> bool:
        return started.monitor == asked.monitor

    def __init__(self, config: EngineProbeConfig) -> None:
        super().__init__(config)
        assert config.monitor is not None
        self._given = config.monitor
        self._watch: Watch | None = None
        self._live: LiveMonitor | None = None
        self._draws = np.random.default_rng()  # of a seed that no client knows
        self._chosen: _Chosen | None = None
        """Of the forward at hand; None: no row of it is read."""
        self._x_ND: torch.Tensor | None = None

    def attach(self, runner: Any) -> None:
        check_architecture(type(runner.model).__name__)
        if runner.device != "cpu" or guard.active().in_graphs:
            raise UnsupportedError(
                "`monitor` reads rows between two operations of a forward, which a replayed graph does not stop for: "
                "it is made for the CPU alone so far",
                fix="record rows on the device (`hook_points`), and judge the segments by `sglang-probe monitor`",
            )
        if guard.active().tp_size > 1:
            raise UnsupportedError("`monitor` under tensor parallelism: only one rank would read", fix="leave it out")
        weights = weight_hash_of_folder(runner.server_args.model_path)
        layers, width = runner.model.model.layers, runner.model_config.hidden_size
        watch, profile, vectors = self._watched(weights, width=width, layers=len(layers))
        assert self.config.live is not None
        if self.config.live.privacy != "ids":
            check_projections(len(watch.features) + len(watch.vectors))
        layer = layer_of(watch.hook_point)
        if layer >= len(layers):
            raise ConfigError(f"`monitor`: `{watch.hook_point}`, and this model has {len(layers)} layers, from 0")
        self._watch = watch
        self._live = self._monitor(watch, profile, vectors, model=runner.server_args.model_path, weights=weights)
        layers[layer].register_forward_hook(_layer_hook(self), with_kwargs=True)

    def _watched(
        self, weights: str | None, *, width: int, layers: int
    ) -> tuple[Watch, StoredProfile | None, dict[str, torch.Tensor]]:
        """What is read: as the profile says, or as the configuration does."""
        from sglang_probe.monitor.stored import Watch, read_profile
        from sglang_probe.sae.folder import weights_sha256

        given = self._given
        if given.profile is not None:
            profile = read_profile(given.profile)
            if profile.model_weight_hash is None or profile.model_weight_hash != weights:
                told = "unknown weights" if profile.model_weight_hash is None else profile.model_weight_hash[:12]
                raise ConfigError(
                    f"the profile {given.profile} is of {told}, and this model has {str(weights)[:12]}",
                    fix="make a profile from runs of the model that is served",
                )
            return profile.watch, profile, dict(profile.vectors)
        assert given.hook_point is not None
        library = None if given.library is None else Library.open(given.library)
        vectors = {} if library is None else {name: library[name] for name in given.vectors}
        for v in vectors.values():
            check_vector(v, width=width, layers=layers, weight_hash=weights)
            if v.card.hook_point != given.hook_point or v.card.kind not in ("probe", "direction"):
                raise ConfigError(f"`monitor`: `{v.name}` is a {v.card.kind} of {v.card.hook_point}")
        watch = Watch(
            hook_point=given.hook_point,
            sampling=given.sampling,
            rows=given.rows,
            features=given.features,
            sae_sha256=None if given.sae is None else weights_sha256(given.sae),
            vectors={name: v.hash for name, v in vectors.items()},
            columns=["unknown"],
        )
        return watch, None, {name: v.vector for name, v in vectors.items()}

    def _monitor(
        self,
        watch: Watch,
        profile: StoredProfile | None,
        vectors: dict[str, torch.Tensor],
        *,
        model: str,
        weights: str | None,
    ) -> LiveMonitor:
        from sglang_probe.engine.live.monitor import LiveMonitor
        from sglang_probe.monitor.reading import Reading
        from sglang_probe.monitor.stored import reading_of
        from sglang_probe.sae.folder import read_sae

        sae = self._given.sae
        if profile is not None:
            reading = reading_of(watch, sae, vectors)
        else:
            opened = None if sae is None else read_sae(sae, hook_point=watch.hook_point)
            reading = Reading(sae=opened, features=watch.features, vectors=vectors)
            watch = watch.model_copy(update={"columns": list(reading.names)})
        return LiveMonitor(
            self._given, watch, reading, profile, model={"model": Path(model).name, "model_weight_hash": weights}
        )

    def judge(self) -> LiveMonitor:
        """What reads and judges the rows, once the model is loaded."""
        assert self._live is not None
        return self._live

    def launch(self, reqs: Sequence[Any], asks: Sequence[Ask], plan: ForwardPlan) -> None:
        self._chosen = self._x_ND = None
        if self._watch is None or self._live is None or self._live.off is not None or not any(plan.decoding):
            return
        try:
            self._chosen = self._choose(reqs, plan)
        except Exception as e:
            self._fail(e)

    def _choose(self, reqs: Sequence[Any], plan: ForwardPlan) -> _Chosen | None:
        assert self._watch is not None
        starts = np.array(plan.starts, dtype=np.int64)
        step = starts - np.array(plan.prompt_lens, dtype=np.int64)
        draw = self._draws.random(len(starts)) if self._watch.sampling.entropy is not None else np.zeros(len(starts))
        wanted = np.array(plan.decoding) & (step >= 0) & self._watch.sampling.candidates(step, draw)
        if plan.under:
            deployed = None if (steering := guard.active().of(Steering)) is None else steering.deployed_id
            for i, under in plan.under.items():
                wanted[i] &= under.id == deployed
        if (most := self._watch.rows) is not None:
            wanted &= np.array([getattr(req, _READ, 0) < most for req in reqs], dtype=bool)
        at = np.flatnonzero(wanted)
        if not len(at):
            return None
        lengths = np.array(plan.ends, dtype=np.int64) - starts
        rows = (np.cumsum(lengths) - lengths)[at]
        return _Chosen(plan, at, rows, draw[at], list(reqs) if most is not None else None)

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Copy the chosen rows of the layer. Inside the model."""
        if self._chosen is None:
            return
        try:
            x_ND = release().residual(forward_batch_of(args, kwargs), output)
            self._x_ND = x_ND[self._chosen.rows.tolist()].clone()
        except Exception as e:
            self._fail(e)

    def after(self, forward: Forward) -> None:
        chosen, x_ND, plan = self._chosen, self._x_ND, forward.plan
        self._chosen = self._x_ND = None
        if chosen is None or x_ND is None or plan is not chosen.plan or self._watch is None:
            return
        try:
            entropy = None if self._watch.sampling.entropy is None else _entropy(forward.logits, chosen.at)
            read, probability = self._watch.sampling.chosen(chosen.draw, entropy)
            if read.any():
                of = chosen.at[read].tolist()
                for req in () if chosen.reqs is None else (chosen.reqs[i] for i in of):
                    setattr(req, _READ, getattr(req, _READ, 0) + 1)
                plan.watched = Watched(
                    rids=[plan.rids[i] for i in of],
                    attempts=[plan.attempts[i] for i in of],
                    positions=[plan.starts[i] for i in of],
                    probability_N=probability[read],
                    entropy_N=None if entropy is None else entropy[read],
                    x_ND=x_ND[np.flatnonzero(read).tolist()],
                    forward_id=plan.forward_id,
                    weights=plan.weights,
                )
        except Exception as e:
            self._fail(e)

    def drop(self) -> None:
        self._chosen = self._x_ND = None

    def _fail(self, error: Exception) -> None:
        logger.exception("sglang-probe: the monitor stopped; the recording goes on", exc_info=error)
        self.drop()
        if self._live is not None:
            self._live.stop(f"it failed: {type(error).__name__}: {error}")


class _Chosen:
    """Rows of the forward at hand that may be read."""

    def __init__(self, plan: ForwardPlan, at: Array, rows: Array, draw: Array, reqs: list[Any] | None) -> None:
        self.plan, self.at, self.rows, self.draw, self.reqs = plan, at, rows, draw, reqs


def _entropy(logits: Any, at: Array) -> Array:
    """Nats of the next-token distributions of some requests of a batch, float64 `[n]`."""
    if logits is None:
        raise UnsupportedError("the forward gave no logits to sample by")
    log_p = logits[at.tolist()].float().log_softmax(-1)
    return np.asarray(-(log_p.exp() * log_p).sum(-1).double().numpy())


def _layer_hook(watching: Watching) -> Callable[..., None]:
    def read(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        watching.take(args, kwargs, output)

    return read
