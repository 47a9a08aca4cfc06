"""Requests that attend to a kept set (`Ask.evict`): whether it can be had, and which rows of a forward are theirs.

Past its first `n` positions such a request's entries are computed from a compressed cache and are no other request's to
reuse, so it publishes nothing; nor may it reuse those that another request computed from a full cache, so its match
ends at `n`. The attention itself is `engine/platform/attention.py` on the reference platform, and `kept_lists.py` with
any other backend on an accelerator.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.ask import WHERE, Ask
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.accelerator import check_model, has_graphs
from sglang_probe.engine.hooks.instruments.base import Forward, Instrument
from sglang_probe.engine.platform import kept_rows
from sglang_probe.engine.platform.environment import accelerator_present
from sglang_probe.engine.platform.kept_rows import KeptRow
from sglang_probe.engine.platform.limits import PROBE_TORCH
from sglang_probe.engine.releases.base import Hook, Release
from sglang_probe.errors import ConfigError, ProbeError, UnsupportedError
from sglang_probe.run.hook_points import REVIEWED_ARCHITECTURES

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig
    from sglang_probe.engine.hooks.instruments.kept_lists import KeptByLists
    from sglang_probe.engine.ledger.facts import ForwardPlan
    from sglang_probe.kept_set import KeptFile

GRAPHS = "nothing attends to kept sets in a replayed graph, and this engine has graphs"
NO_GRAPHS = "set `server: {disable_cuda_graph: true}`, and nothing for the graphs of a phase, which goes before it"

_UNPACKED = 1024
"""Kept sets held unpacked: more than a batch has requests."""


class KeptSets(Instrument):
    """See the module."""

    name = "kept sets"
    field = "evict"
    features = ("bypass", "eviction")
    in_model = True
    sets: SetsOfRecording | None = None
    lists: KeptByLists | None = None
    """Set once the model is loaded, where another backend than the reference platform's attends."""

    @classmethod
    def needs(cls, config: EngineProbeConfig) -> Sequence[str]:
        in_graphs = config.simulated_graphs or accelerator_present()
        return [*cls.features, *(("rows", "attention rows", "telemetry") if in_graphs else ())]

    @classmethod
    def hooks(cls, release: Release) -> list[Hook]:
        return release.bypass_hooks()

    def open(self, config: EngineProbeConfig, scheduler: Any) -> None:
        super().open(config, scheduler)
        kept_rows.at_hand = ()
        self.sets = None if config.kept is None else open_sets(scheduler, config.kept, by_lists=self.lists is not None)

    def attach(self, runner: Any) -> None:
        check_reviewed(type(runner.model).__name__)
        if guard.active().in_graphs and backends_of(runner.server_args) != {PROBE_TORCH}:
            from sglang_probe.engine.hooks.instruments.kept_lists import KeptByLists

            check_model(runner, self.config)
            self.lists = KeptByLists(runner)

    def before(self, forward: Forward) -> None:
        if self.lists is not None:
            self.lists.before(forward, kept_rows.at_hand)

    def after(self, forward: Forward) -> None:
        if self.lists is not None:
            self.lists.after(forward)

    def admit(self, ask: Ask, req: Any) -> None:
        if ask.evict is None:
            return
        if self.sets is None:
            raise ConfigError(f"{WHERE}.evict: `{ask.evict}` is no kept set of this recording, which has none")
        if reason := self.sets.refusal(ask.evict, len(req.origin_input_ids)):
            raise ConfigError(f"{WHERE}.evict: {reason}")

    def read_limit(self, ask: Ask, req: Any) -> int | None:
        if ask.evict is None or self.sets is None or self.sets.refusal(ask.evict, len(req.origin_input_ids)):
            return None
        return self.sets.lengths[ask.evict]

    def launch(self, reqs: Sequence[Any], asks: Sequence[Ask], plan: ForwardPlan) -> None:
        kept_rows.at_hand = () if self.sets is None else rows_of(self.sets, reqs, asks, plan)

    def launched(self) -> None:
        kept_rows.at_hand = ()

    def drop(self) -> None:
        kept_rows.at_hand = ()
        if self.lists is not None:
            self.lists.drop()


class SetsOfRecording:
    """The kept sets of a recording, as the engine uses them.

    Raises (on construction):
        ProbeError: the file cannot be read. UnsupportedError: a set is for another model.
    """

    def __init__(self, file: KeptFile, *, layers: int, kv_heads: int) -> None:
        for key, shape in file.shapes.items():
            if shape[1:3] != (layers, kv_heads):
                raise UnsupportedError(
                    f"the kept set `{key}` is for {shape[1]} layers of {shape[2]} kv heads; the model has {layers} "
                    f"of {kv_heads}"
                )
        self.lengths = {key: shape[-1] for key, shape in file.shapes.items()}
        self.kept = functools.lru_cache(_UNPACKED)(file.__getitem__)

    def refusal(self, key: str, prompt_len: int) -> str | None:
        """Why a request cannot have this kept set."""
        if key not in self.lengths:
            return f"`{key}` is no kept set of this recording"
        if self.lengths[key] > prompt_len:
            return f"the kept set `{key}` is for {self.lengths[key]} positions and the prompt has {prompt_len}"
        return None


def check_reviewed(architecture: str) -> None:
    """Refuse kept sets of a model whose attention was not compared with a reference, whatever rows are captured of it:
    with latent attention or a window the entries of a slot are not those of each kv head.

    Raises:
        UnsupportedError: names the reviewed architectures.
    """
    if architecture not in REVIEWED_ARCHITECTURES:
        raise UnsupportedError(
            f"kept sets of {architecture}: attention to them was not compared with a reference",
            fix=f"serve it without kept sets; reviewed: {', '.join(REVIEWED_ARCHITECTURES)}",
        )


def backends_of(server_args: Any) -> set[str]:
    """Attention backends that were asked for."""
    asked = {getattr(server_args, f"{phase}attention_backend") for phase in ("", "prefill_", "decode_")}
    return asked - {None}


def open_sets(scheduler: Any, path: Path, *, by_lists: bool) -> SetsOfRecording:
    """The kept sets that a recording names.

    Args:
        by_lists: whether queries past their cache are answered by lists, so that the backend may be any.

    Raises:
        ProbeError: as `SetsOfRecording`. UnsupportedError: the engine does not attend as a kept set needs.
    """
    from sglang_probe.kept_set import KeptFile

    server, model = scheduler.server_args, scheduler.model_config
    backends = backends_of(server)
    if not by_lists and backends != {PROBE_TORCH}:
        raise UnsupportedError(
            f"kept sets need the attention backend `{PROBE_TORCH}`; this engine has {sorted(backends)}",
            fix=f"set `server: {{attention_backend: {PROBE_TORCH}}}` on a machine without an accelerator",
        )
    if by_lists and scheduler.tp_worker.model_runner.device != "cpu" and has_graphs():
        raise UnsupportedError(GRAPHS, fix=NO_GRAPHS)
    if server.tp_size != 1:
        raise UnsupportedError("under tensor parallelism each rank has a share of the kv heads", fix="set `tp_size: 1`")
    return SetsOfRecording(KeptFile(path), layers=model.num_hidden_layers, kv_heads=model.get_num_kv_heads(1))


def rows_of(sets: SetsOfRecording, reqs: Sequence[Any], asks: Sequence[Ask], plan: ForwardPlan) -> list[KeptRow]:
    """Rows of a forward with queries past the end of their cache.

    Raises:
        ProbeError: a request that was admitted under a kept set cannot have it.
    """
    found = []
    for i, (req, ask) in enumerate(zip(reqs, asks, strict=True)):
        if ask.evict is None:
            continue
        if reason := sets.refusal(ask.evict, plan.prompt_lens[i]):
            if req.to_finish is not None:  # refused at its arrival: one token runs in the place of its prompt
                continue
            raise ProbeError(f"request {req.rid}: {reason}")
        if plan.ends[i] > sets.lengths[ask.evict]:
            kept = sets.kept(ask.evict)
            found.append(KeptRow(i, req.rid, plan.attempts[i], kept, plan.starts[i], plan.ends[i]))
    return found
