"""A live server: what the scheduler process reports, and per-request provenance.

Where SGLang's internal state is read and an answer is built is the release's to say (`Release.live_hooks`). The HTTP
side is `engine/hooks/http.py`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks import guard, inventory
from sglang_probe.engine.hooks.instruments.base import Instrument
from sglang_probe.engine.hooks.instruments.monitor import Watching
from sglang_probe.engine.hooks.instruments.steer import steering_of_session
from sglang_probe.engine.live.answer_files import clear, rank_folder
from sglang_probe.engine.platform.environment import platform_facts
from sglang_probe.engine.releases.base import Hook, Release
from sglang_probe.run.hook_points import engine_module

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig
    from sglang_probe.engine.ledger.facts import ForwardPlan, RequestEnd
    from sglang_probe.engine.live.answers import Answers
    from sglang_probe.engine.live.metrics import Metrics
    from sglang_probe.engine.live.provenance import Span
    from sglang_probe.engine.live.recording import LiveRecording

logger = logging.getLogger("sglang_probe")

STATE_KEY = "probe"
"""Entry in the scheduler's internal state (and so in `/server_info`)."""

META_KEY = "probe"
"""Entry in `meta_info` of a request that asked for its provenance."""


class LiveServer(Instrument):
    """A live server is recorded in segments; a request may ask for its provenance."""

    name = "live"
    field = "provenance"
    features = ("live",)

    @classmethod
    def wanted(cls, config: EngineProbeConfig) -> bool:
        return config.live is not None

    @classmethod
    def hooks(cls, release: Release) -> list[Hook]:
        return release.live_hooks()

    @classmethod
    def serves(cls, started: EngineProbeConfig, asked: EngineProbeConfig) -> bool:
        return started.live is None and asked.live is None  # segments follow each other; a recording never ends

    def __init__(self, config: EngineProbeConfig) -> None:
        super().__init__(config)
        self.asking: dict[str, str] = {}
        """Names of running requests that asked, by their id."""

    def open(self, config: EngineProbeConfig, scheduler: Any) -> None:
        super().open(config, scheduler)
        self.asking.clear()

    def launch(self, reqs: Sequence[Any], asks: Sequence[Ask], plan: ForwardPlan) -> None:
        live = guard.active().live
        if live is not None:
            rows = zip(reqs, asks, plan.rids, plan.contexts, strict=True)
            asking = {name: r.rid for r, ask, name, context in rows if ask.provenance and context is not None}
            self.asking.update({rid: name for name, rid in asking.items()})
            live.launched(plan, set(asking))

    def end(self, rid: str) -> None:
        if self.asking:
            self.asking = {asked: name for asked, name in self.asking.items() if name != rid}


def start(config: EngineProbeConfig, server_args: Any, dp_rank: int, resolved: dict[str, Any]) -> LiveRecording:
    """Begin to record. Called once the scheduler is built.

    Data-parallel ranks are servers of their own with one address: rank n of several records into `dp<n>`.

    Args:
        resolved: the server arguments that are in force.

    Raises:
        RunDirectoryError: another server records into the same directory.
    """
    from sglang_probe.engine.live.recording import LiveRecording

    assert config.live is not None
    several = server_args.dp_size > 1
    reviewed = inventory.load_inventory()
    facts = {
        "kind": "live",
        "arm": "live",
        "model": {"name": server_args.model_path, **_weights()},
        "model_path": server_args.model_path,
        "dtype": resolved["dtype"],
        "hook_points": {name: engine_module(name) for name in config.hook_points},
        "telemetry": None if config.telemetry is None else config.telemetry.model_dump(mode="json"),
        "rows_kept": config.rows.model_dump(mode="json"),
        **guard.active().facts(),
        **guard.active().proved(),
        "server_resolved": resolved,
        "platform": platform_facts(),
        "inventory": {"sglang": reviewed.sglang, "version": reviewed.version},
        "privacy": config.live.privacy,
        "rows_dropped": 0,
    }
    drops = config.live.when_full == "drop" or (config.live.when_full is None and not config.hook_points)
    live_config = config.live
    if several and live_config.upload is not None:
        upload = live_config.upload.model_copy(update={"to": f"{live_config.upload.to.rstrip('/')}/dp{dp_rank}"})
        live_config = live_config.model_copy(update={"upload": upload})
    live = LiveRecording(
        config.run.resolve() / f"dp{dp_rank}" if several else config.run.resolve(),
        live_config,
        {**facts, "dp_rank": dp_rank},
        part_seconds=config.checkpoint_seconds,
        drops=drops,
        metrics=_metrics(server_args, dp_rank if several else None),
        answers=_answers(config, dp_rank, server_args.dp_size),
        monitor=None if (watching := guard.active().of(Watching)) is None else watching.judge(),
    )
    if live.answers is None:  # rows of an earlier server: nobody is to fetch them from here
        clear(answers_folder(config.run), dp_rank, server_args.dp_size)
    return live


def _answers(config: EngineProbeConfig, dp_rank: int, ranks: int) -> Callable[[], Answers] | None:
    """What makes the keeper of rows for requests that ask for them: each rank in a folder of its own."""
    if "rows" not in config.asks or config.live is None:
        return None
    from sglang_probe.engine.live.answers import Answers

    root, rows = answers_folder(config.run), config.live.rows

    def make() -> Answers:
        clear(root, dp_rank, ranks)
        return Answers(rank_folder(root, dp_rank), rows, config.hook_points).start()

    return make


def answers_folder(run: Path) -> Path:
    """Where rows wait to be fetched, a folder for each data-parallel rank."""
    return run.resolve() / ".answers"


def _weights() -> dict[str, Any]:
    """The hash of the model's files, where interventions had them read anyway: an audit asks for it."""
    steering = steering_of_session()
    return {} if steering is None else {"weight_hash": steering.weight_hash}


_KNOWN = "_sglang_probe_name"
"""Attribute of a `Req` that was launched: the epoch of the recording that knows it, and its name there."""


def names_of(reqs: Sequence[Any]) -> tuple[list[str], frozenset[str]]:
    """Names of requests in the ledger, given at their first launch; and which of them began before the present
    recording and are seen in it for the first time. Runs inside guarded code."""
    session = guard.active()
    live, epoch = session.live, session.epoch
    if live is None:
        return [r.rid for r in reqs], frozenset()
    names, before = [], []
    for r in reqs:
        known = getattr(r, _KNOWN, None)
        if known is None or known[0] != epoch:
            name = live.name(r.rid)
            setattr(r, _KNOWN, (epoch, name))
            if known is not None:
                before.append(name)
            names.append(name)
        else:
            names.append(known[1])
    return names, frozenset(before)


def name_of(req: Any) -> str:
    """The name of one request. Runs inside guarded code."""
    return names_of([req])[0][0]


def began_before(req: Any) -> bool:
    """Whether a request was launched before the present recording began, and not since."""
    session = guard.active()
    known = None if session.live is None else getattr(req, _KNOWN, None)
    return known is not None and known[0] != session.epoch


def served_unrecorded(reqs: Sequence[Any]) -> list[Any]:
    """These requests are launched while nothing is recorded. Returns those that were not launched before."""
    new = [req for req in reqs if getattr(req, _KNOWN, None) is None]
    for req in new:
        setattr(req, _KNOWN, (0, ""))
    return new


def ending(reqs: Sequence[Any], ends: Sequence[RequestEnd]) -> list[RequestEnd]:
    """These requests are about to end; returns `ends` under their names. Runs inside guarded code."""
    live = guard.active().live
    if live is None:
        return list(ends)
    named_ends = [replace(end, rid=name_of(r)) for r, end in zip(reqs, ends, strict=True)]
    for r, end in zip(reqs, named_ends, strict=True):
        # Of a prompt given as embeddings SGLang's token ids are made up; others have embeddings put over some tokens.
        made_up = r.input_embeds is not None or getattr(r, "positional_embed_overrides", None) is not None
        live.ending(end.rid, None if made_up else r.origin_input_ids)
    return named_ends


def get_internal_state(result: Any, _controller: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `get_internal_state`: add what the endpoints show."""
    with contextlib.suppress(Exception):  # a readback is no reason to stop a recording
        result.internal_state[STATE_KEY] = state()


def state() -> dict[str, Any]:
    """Whether this process is being recorded, or why not, and the counts."""
    session = guard.session
    if session is None or session.live is None:
        return {"recording": False, "reason": "the recording was not started"}
    libraries = [found for i in session.instruments if (found := i.library()) is not None]
    told = {k: v for i in session.instruments for k, v in i.status().items()}
    return {**session.live.status(), **({"libraries": dict(libraries)} if libraries else {}), **told}


def anybody_asks() -> bool:
    """Whether a request in flight asked for its provenance."""
    session = guard.session
    return session is not None and session.live is not None and session.live.totals.asking > 0


@guard.guarded
def provenance_of(reqs: Sequence[Any]) -> list[list[Span]] | None:
    """Spans of those of these requests that finish now and asked; None if none does, so that nobody's `meta_info`
    changes."""
    live = guard.active().live
    assert live is not None
    spans = [live.provenance(name_of(r)) or [] if r.finished() and not began_before(r) else [] for r in reqs]
    return spans if any(spans) else None


@guard.guarded
def provenance_by_id(rids: Sequence[str], finished: Sequence[bool]) -> list[list[Span]] | None:
    """`provenance_of` where a release has the ids alone: of two requests that share one, the later."""
    session = guard.active()
    server, live = session.of(LiveServer), session.live
    assert live is not None
    assert server is not None
    names = (server.asking.get(rid) if done else None for rid, done in zip(rids, finished, strict=True))
    spans = [[] if name is None else live.provenance(name) or [] for name in names]
    return spans if any(spans) else None


def _metrics(server_args: Any, dp_rank: int | None) -> Metrics | None:
    if not server_args.enable_metrics:
        return None
    from sglang_probe.engine.live.metrics import Metrics

    try:
        return Metrics(server_args.served_model_name or server_args.model_path, dp_rank)
    except Exception:
        logger.exception("sglang-probe has no Prometheus series")
        return None
