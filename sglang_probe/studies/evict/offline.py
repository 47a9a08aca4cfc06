"""The offline grid: every policy under every budget and protocol on captured requests, selected and judged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.base import Policy, Selection
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.protocol import Protocol
from sglang_probe.eviction.select import top_k
from sglang_probe.studies.evict.controls import CONTROLS, WRONG_WINDOW, Spoil
from sglang_probe.studies.evict.grid import Entry, Trivial, budget_name, tokens_of
from sglang_probe.studies.evict.judge import Judge, check_counts
from sglang_probe.studies.evict.layers import Batch
from sglang_probe.studies.evict.lookahead_runs import Ahead

CELL = ["task", "protocol", "kind", "policy", "budget"]
"""Columns that name a cell of the grid."""

Keep = Callable[[str, Protocol, Entry, str, Batch, Tensor], None]
"""Receives kept sets of evictions: task, protocol, policy, budget, batch, and bool `[B, Y, G, L]`."""


@dataclass
class Offline:
    """What the grid found; `frames()` gives it as tables."""

    asserted: int = 0
    """Requests whose kept counts were asserted, over all cells."""
    _rows: list[pd.DataFrame] = field(default_factory=list)
    _heads: dict[tuple[Any, ...], list[Any]] = field(default_factory=dict)
    _excluded: dict[tuple[Any, ...], int] = field(default_factory=lambda: defaultdict(int))

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """By request, by layer and head, and what was left out with the reason."""
        heads = []
        for cell, (held, mass, layers) in self._heads.items():
            count = held.shape[1]
            heads.append(
                pd.DataFrame(
                    {
                        **dict(zip(CELL, cell, strict=True)),
                        "layer": np.repeat(layers, count),
                        "head": np.tile(np.arange(count), len(layers)),
                        "held": held.ravel(),
                        "mass": mass.ravel(),
                    }
                )
            )
        names = [*CELL, "reason", "requests"]
        excluded = pd.DataFrame([(*k, n) for k, n in self._excluded.items()], columns=names)
        rows, by_head = (pd.concat(x, ignore_index=True) if x else pd.DataFrame() for x in (self._rows, heads))
        return rows, by_head, excluded

    def add(self, cell: tuple[str, ...], batch: Batch, layer: Layer, judged: Any, budget: int) -> None:
        """Take in the judgement of one cell on one batch."""
        named = dict(zip(CELL, cell, strict=True))
        shape = {"tokens": budget, "length": layer.length}
        self._rows.append(pd.DataFrame({**named, "rid": list(batch.rids), **shape, **judged.by_request}))
        held, mass = judged.held_BYH.sum(0), judged.nontrivial_BYH.sum(0)
        if cell in self._heads:
            self._heads[cell][0] += held
            self._heads[cell][1] += mass
        else:
            self._heads[cell] = [held, mass, layer.index[0].numpy()]

    def exclude(self, cell: tuple[str, ...], reason: str, requests: int) -> None:
        """Count requests that a cell could not judge."""
        self._excluded[(*cell, reason)] += requests


def run_offline(
    task: str,
    found: Iterable[Batch],
    entries: Sequence[Entry],
    budgets: Sequence[int | Fraction],
    protocols: Sequence[Protocol],
    trivial: Trivial,
    *,
    controls_of: Sequence[Entry] = (),
    ahead: Ahead | None = None,
    out: Offline,
    keep: Keep | None = None,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Judge a task's batches into `out`.

    Args:
        controls_of: the methods that the negative controls spoil.
        ahead: lookahead queries; without them the methods that ask for some are left out, and listed so.
        keep: called with every kept set of an eviction that runs in the engine (controls do not).
        advance: called after each policy on each batch and protocol.
    """
    for batch in found:
        for protocol in protocols:
            layer = batch.under(protocol)
            judge = Judge(layer, trivial, batch.itemsize)
            for entry, spoil in [*((e, None) for e in entries), *spoiled(controls_of)]:
                chosen = (
                    _selections(entry.policy, _seen(entry, spoil, layer), budgets)
                    if entry.lookahead is None
                    else _ahead_selections(entry, layer, spoil, budgets, protocol, batch, ahead or Ahead())
                )
                for budget, selection in chosen:
                    cell = (task, protocol.value, entry.kind, entry.label, budget_name(budget))
                    tokens = tokens_of(budget, layer.length)
                    try:
                        if isinstance(selection, ProbeError):
                            raise selection
                        judged = (judge.wide if entry.per_query_head else judge)(entry.policy, selection, tokens)
                    except ProbeError as e:
                        out.exclude(cell, e.message, len(batch.rids))
                        continue
                    out.asserted += check_counts(entry.policy, selection, tokens)
                    out.add(cell, batch, layer, judged, tokens)
                    if keep is not None and entry.evicts and entry.kind != "control":
                        keep(task, protocol, entry, budget_name(budget), batch, selection.keep_GL)
                advance()


def spoiled(controls_of: Sequence[Entry]) -> list[tuple[Entry, Spoil]]:
    """The negative controls, each with what spoils the layer that it selects on.

    A window at the wrong position says nothing of a method that scores by lookahead queries.
    """
    return [
        (replace(e, label=f"{e.label}: {label}", kind="control"), spoil)
        for e in controls_of
        for label, spoil in CONTROLS.items()
        if e.lookahead is None or label != WRONG_WINDOW
    ]


def _ahead_selections(
    entry: Entry,
    layer: Layer,
    spoil: Spoil | None,
    budgets: Sequence[int | Fraction],
    protocol: Protocol,
    batch: Batch,
    ahead: Ahead,
) -> Iterator[tuple[int | Fraction, Selection | ProbeError]]:
    """As `_selections` for a policy whose lookahead queries may be others under each budget."""
    assert entry.lookahead is not None
    for budget in budgets:
        try:
            mine = ahead.into(layer, entry.lookahead, protocol, budget_name(budget), batch.rids)
        except ProbeError as e:
            yield budget, e
            continue
        yield from _selections(entry.policy, _seen(entry, spoil, mine), [budget])


def _seen(entry: Entry, spoil: Spoil | None, layer: Layer) -> Layer:
    """What a policy selects on."""
    layer = layer if spoil is None else spoil(layer, 0)
    return layer.per_query_head() if entry.per_query_head else layer


def _selections(
    policy: Policy, layer: Layer, budgets: Sequence[int | Fraction]
) -> Iterator[tuple[int | Fraction, Selection | ProbeError]]:
    """A selection per budget; scores that no budget changes are computed once. A refusal is given as its error."""
    scores: Tensor | None = None
    for budget in budgets:
        tokens = tokens_of(budget, layer.length)
        if tokens < 1:
            yield budget, ProbeError(f"a budget of {budget} is less than one of {layer.length} positions")
            continue
        try:
            if type(policy).select is not Policy.select:
                yield budget, policy.select(layer, tokens)
                continue
            if scores is None:
                scores = policy.scores(layer)
            keep = top_k(scores, policy.budgets(layer, tokens), policy.protected(layer, tokens))
            yield budget, Selection(keep.unsqueeze(-3), scores.unsqueeze(-3), evicts=True)
        except ProbeError as e:
            yield budget, e
