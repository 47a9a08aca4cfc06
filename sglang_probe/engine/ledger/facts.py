"""What passes between the hooks, the recorder and the writer: plans of forward passes, ends of requests, commits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sglang_probe.engine.ledger.clock import now
from sglang_probe.engine.ledger.lineage import Origin


@dataclass(frozen=True, slots=True)
class Context:
    """Token ids of a request (any buffer of int64) and what else separates prefixes: `(extra_key, cache_salt)`."""

    tokens: Any
    namespace: object
    matched: Matched | None = None
    """Of a request at its launch: when the tree was asked for its prefix; None: nobody saw it."""
    labels: str | None = None
    """What the request belongs to, as JSON."""


@dataclass(frozen=True, slots=True)
class Matched:
    """The radix tree was asked for a request's prefix."""

    recording: object  # whose events it is numbered among (`TreeEvents`)
    order: int
    limit: int | None  # positions that could be given at most; None: not known
    limited_by: str | None


@dataclass(frozen=True, slots=True)
class Under:
    """Under which interventions a request runs (`steering/spec.py`), from its first changed position on."""

    id: str
    onset: int
    prompt_len: int
    spec: str  # JSON

    def cut(self, start: int, end: int) -> list[tuple[int, int, str | None]]:
        """Positions `[start, end)` in what lies before the onset and what does not, with the mark of each."""
        at = min(max(start, self.onset), end)
        return [(a, b, mark) for a, b, mark in ((start, at, None), (at, end, self.id)) if a < b]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a gate by a probe decided for a request: a row of the table `gates`, without the name of the request."""

    intervention: str
    probe: str
    hook_point: str
    position: int
    attempt: int
    forward_id: int
    score: float
    threshold: float
    opened: bool
    spec: str


@dataclass(frozen=True, slots=True)
class BudgetEvent:
    """Something that became of the budget of interventions: a row of the table `budget`, without its forward."""

    at: float
    event: str
    milliseconds: float
    budget_ms: float
    rid: str | None = None
    intervention: str | None = None


@dataclass(frozen=True, slots=True)
class Watched:
    """Decode rows of one forward pass that a monitor reads; n of them."""

    rids: list[str]
    attempts: list[int]
    positions: list[int]
    probability_N: Any  # float64 [n], with which each was read
    entropy_N: Any  # float64 [n]; None: the rule does not ask
    x_ND: Any  # tensor [n, d] on the host, in the model's dtype
    forward_id: int
    weights: int

    def without(self, gone: set[str]) -> Watched | None:
        """The rows of other requests than these; None: there are none."""
        keep = [i for i, rid in enumerate(self.rids) if rid not in gone]
        if len(keep) == len(self.rids):
            return self
        if not keep:
            return None
        return Watched(
            [self.rids[i] for i in keep],
            [self.attempts[i] for i in keep],
            [self.positions[i] for i in keep],
            self.probability_N[keep],
            None if self.entropy_N is None else self.entropy_N[keep],
            self.x_ND[keep],
            self.forward_id,
            self.weights,
        )


@dataclass(slots=True)
class ForwardPlan:
    """What one forward pass computes: per request, positions `[starts[i], ends[i])`, in batch order."""

    tag: int  # the scheduler's own number of this forward, to match launch and commit
    mode: str
    rids: list[str]
    starts: list[int]
    ends: list[int]
    decoding: list[bool]
    attempts: list[int]
    prompt_lens: list[int]
    contexts: list[Context | None]  # what identifies the prefix of each prefill row; None for decode rows
    slots: int  # KV slots that the engine allocated for this forward
    waiting: int = 0
    weights: int = 0  # weight updates of the engine before this launch
    unaccounted: str | None = None  # why nothing of this forward can be told apart, if so
    # Requests that began while nothing was recorded, and where they go on: attempt and position.
    began_before: frozenset[str] = frozenset()
    carried: dict[str, tuple[int, int]] = field(default_factory=dict)
    launched: float = field(default_factory=now)
    forward_id: int = -1
    row_start: int = -1
    rows: dict[str, Any] | None = None
    graph: bool = False  # whether the forward was replayed from a graph
    selected: dict[str, Any] = field(default_factory=dict)  # see Commit
    telemetry: Any = None
    # What is still on its way from the device, by the field that it fills at commit (engine/capture/transfer.py).
    travelling: dict[str, Any] = field(default_factory=dict)
    matched: list[tuple[Any, ...]] = field(default_factory=list)  # rows of `schema.TREE`, of requests that begin here
    origins: dict[int, list[Origin]] = field(default_factory=dict)  # of what each row reuses, by batch index
    under: dict[int, Under] = field(default_factory=dict)  # interventions of each row's request, by batch index
    gates: dict[int, Decision] = field(default_factory=dict)  # of requests with a gate that is decided, by batch index
    budget: list[BudgetEvent] = field(default_factory=list)  # what happened to it since the forward before
    watched: Watched | None = None  # decode rows that a monitor reads
    discarded: set[str] = field(default_factory=set)  # requests that finished before this forward's commit

    @property
    def tokens(self) -> int:
        return sum(self.ends) - sum(self.starts)


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """What the engine says of a request when it finishes."""

    rid: str
    prompt_len: int
    output_len: int
    cached_tokens: int
    retractions: int
    finish_reason: str
    output_ids: list[int]


class Prompt(Protocol):
    """A prompt that ended, before anything of it may be written: the writer's thread asks what may."""

    @property
    def nbytes(self) -> int:
        """Memory that it needs, about."""

    def told(self) -> tuple[Any, ...]:
        """A row of `schema.PROMPTS`."""


@dataclass(slots=True)
class Commit:
    """Facts ready to be written: rows of one forward pass, and spans and requests that closed with it."""

    forward: tuple[Any, ...] | None = None
    rows: dict[str, Any] | None = None
    numbered: int = 0  # rows that the forward was given numbers for
    # Of hook points that do not hold every row, the selected ones, by their place in the forward. They may have none.
    selected: dict[str, Any] = field(default_factory=dict)
    telemetry: Any = None  # capture.telemetry.Measured of its decode steps
    spans: list[tuple[Any, ...]] = field(default_factory=list)
    rebinds: list[tuple[Any, ...]] = field(default_factory=list)
    tree: list[tuple[Any, ...]] = field(default_factory=list)  # `schema.TREE`
    requests: list[tuple[Any, ...]] = field(default_factory=list)
    interventions: dict[str, Under] = field(default_factory=dict)  # of its requests that run under any
    gates: dict[str, Decision] = field(default_factory=dict)  # of its requests whose gate is decided
    budget: list[tuple[Any, ...]] = field(default_factory=list)  # events of the budget of interventions
    prompts: list[Prompt] = field(default_factory=list)  # of a live recording
    watched: Watched | None = None  # decode rows that a monitor reads
    monitored: list[tuple[Any, ...]] = field(default_factory=list)  # what it read of them (`schema.MONITORED`)
    order: int = -1  # of a live recording with a monitor: its place among the commits that were handed to writers
    lost: list[tuple[str, str]] = field(default_factory=list)  # requests that cannot be accounted for any more, and why


class Sink(Protocol):
    """Where commits go; it may block (back-pressure) but never raises for a full queue."""

    def put(self, commit: Commit) -> None: ...


def cut(commit: Commit, plan: ForwardPlan, lost: list[int]) -> None:
    """Take the rows and measurements of some requests of a forward out of its commit."""
    lengths = np.array(plan.ends) - np.array(plan.starts)
    keep = np.repeat(~np.isin(np.arange(len(lengths)), lost), lengths)
    place = np.cumsum(keep) - 1
    if commit.rows is not None:
        rows, selected = {}, {}
        for hook_point, captured in commit.rows.items():
            held = commit.selected.get(hook_point)
            kept = np.flatnonzero(keep if held is None else keep[held])
            rows[hook_point] = captured[kept.tolist()]
            if held is not None:
                selected[hook_point] = place[held[kept]]
        commit.rows, commit.selected = rows, selected
    if commit.telemetry is not None:
        commit.telemetry = commit.telemetry.without({plan.rids[i] for i in lost})
