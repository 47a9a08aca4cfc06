"""The coverage study: which classes of tokens a harvest holds, set against the traffic that it was taken from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sglang_probe.axes.axes import make_axis, needs_ids
from sglang_probe.axes.axis import Axis, Sources
from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run
from sglang_probe.studies.coverage import reuse as lineage
from sglang_probe.studies.coverage.contexts import TrieBuilder
from sglang_probe.studies.coverage.families import find_families
from sglang_probe.studies.coverage.result import Coverage, map_of, totals_of
from sglang_probe.studies.coverage.reuse import COMPUTED
from sglang_probe.studies.coverage.tally import FIRST, NEVER, SEEN, UNKNOWN, Tally
from sglang_probe.studies.coverage.walk import Step, Walk

Array = np.ndarray[Any, Any]


class Study:
    """One run and its axes: the passes over its positions.

    Args:
        axes: axes to study one by one; see `classes.axes.make_axis`.
        by: an axis to cross each of them with.
        model: folder with the tokenizer; default: where the run's model was.

    Raises (on construction):
        ConfigError: no such axis.
    """

    def __init__(self, run: Run, axes: Sequence[str], *, by: str | None = None, model: Path | None = None) -> None:
        self.run = run
        self.walk = Walk(run)
        path = model or run.manifest.get("model_path")
        sources = Sources(
            segments=self.walk.requests.segments.names,
            labels={name: i.names for name, i in self.walk.requests.labels.items()},
            model=Path(path) if path else None,
        )
        self.has_ids = self._has_ids()
        self.missing: dict[str, str] = {}
        made = {spec: self._usable(spec, sources) for spec in dict.fromkeys([*axes, *([by] if by else [])])}
        found = {spec: axis for spec, axis in made.items() if axis is not None}
        self.axes = list(found.values())
        self._plans: list[tuple[Axis, ...]] = [(found[spec],) for spec in dict.fromkeys(axes) if spec in found]
        if by in found:
            self._plans += [(found[spec], found[by]) for spec in dict.fromkeys(axes) if spec in found and spec != by]

    def _usable(self, spec: str, sources: Sources) -> Axis | None:
        if not self.has_ids and needs_ids(spec, sources):
            self.missing[spec] = _NO_IDS
            return None
        return make_axis(spec, sources)

    def _has_ids(self) -> bool:
        return any(int(step.batch.ids.max(initial=-1)) >= 0 for step in self.walk.steps(ids=True))

    def require_axes(self) -> None:
        """Refuse to go on with nothing to study.

        Raises:
            ConfigError: none of the axes can be used on this run.
        """
        if not self._plans and self.missing:
            why = "; ".join(f"`{name}`: {reason}" for name, reason in self.missing.items())
            raise ConfigError(
                f"{self.run.path}: no axis can be used: {why}", fix="try `segment`, `position` or `phase`"
            )

    def measure(self, *, seed: int = 0) -> Coverage:
        """Walk over the run and count. `seed` puts more families than there are groups into groups."""
        walk = self.walk
        new_from, counted, never = self._contexts()
        reuses = lineage.reuses_of(walk.traffic, walk.spans)
        families = find_families(walk.requests, walk.traffic, seed=seed)
        tallies = [Tally(plan, families.groups) for plan in self._plans]
        whole = Tally([], 1)
        moments = np.zeros(2)
        for step, labels in self.labelled():
            state = step.each_fate() * np.uint8(4) + _context(step, new_from, counted, never)
            changes, level = _multiplicity(step, reuses, walk)
            runs = step.runs(state, *labels.values(), edges=changes)
            state = state[runs.start]
            computed = np.flatnonzero(state // 4 == COMPUTED)
            length = runs.length[computed]
            multiplicity = level[np.searchsorted(changes, runs.start[computed], side="right")]
            moments += (multiplicity * length).sum(), (np.square(multiplicity) * length).sum()
            bins = _BIN_OF[np.minimum(multiplicity, len(_BIN_OF) - 1)]
            group = families.group[step.low : step.high][runs.request]
            told = {name: label[runs.start] for name, label in labels.items()}
            whole.add([], np.zeros_like(group), state, runs.length, computed, bins)
            for tally in tallies:
                tally.add([told[a.name] for a in tally.axes], group, state, runs.length, computed, bins)
        return Coverage(
            run=str(self.run.manifest.get("name", self.run.path.name)),
            totals=totals_of(whole, moments, len(walk.requests), families.count, known=bool(counted.any())),
            maps=[map_of(t, known=bool(counted.any())) for t in tallies],
            notes=self._notes(reuses.elsewhere, counted),
            families=families.source,
            missing_axes=self.missing,
        )

    def labelled(self) -> Iterator[tuple[Step, dict[str, Array]]]:
        """One pass over the run: batches, and the labels of each axis by its name."""
        for axis in self.axes:
            axis.begin()
        for step in self.walk.steps(ids=any(a.needs_ids for a in self.axes)):
            yield step, {axis.name: axis.labels(step.batch) for axis in self.axes}

    def _contexts(self) -> tuple[Array, Array, dict[int, lineage.Ranges]]:
        """Where each request's contexts become new, which requests that is known of, and new ones that the run lacks.

        The axes that observe see their batches in the same pass.
        """
        walk, count = self.walk, len(self.walk.requests)
        observers = [a for a in self.axes if a.observes]
        whole = walk.traffic.begin == 0
        if not self.has_ids:
            return np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool), {}
        builder, counted = TrieBuilder(), np.zeros(count, dtype=bool)
        for step in walk.steps(ids=True):
            for axis in observers:
                axis.observe(step.batch)
            offsets, ids, complete = _complete(step, whole)
            counted[step.low : step.high] = complete
            builder.add(offsets, ids)
        trie = builder.build(lambda: ((s.low, *_complete(s, whole)[:2]) for s in walk.steps(ids=True)))
        missing = lineage.not_in_run(walk.traffic, walk.spans)
        never = lineage.never_in_run({r: m for r, m in missing.items() if counted[r]}, trie)
        return trie.new_from, counted, never

    def _notes(self, elsewhere: int, counted: Array) -> list[str]:
        notes = []
        lengths = self.walk.traffic.end - self.walk.traffic.begin
        without = int(lengths[~counted].sum())
        if not self.has_ids:
            notes.append("No token ids were recorded, so unique contexts are not known.")
        elif without:
            notes.append(
                f"Unique contexts leave out {without:,} positions of requests whose tokens are not all known "
                "(in flight at the border of a segment)."
            )
        if elsewhere:
            notes.append(
                f"{elsewhere:,} reused positions come from entries outside this run's traffic: computed before the "
                "recording, by a retracted attempt, or by a discarded step."
            )
        if dropped := int(self.run.manifest.get("rows_dropped") or 0):
            notes.append(f"{dropped:,} computed rows were dropped by a slow disk and are counted as computed here.")
        if not self.run.complete:
            notes.append("The run is not complete; this is the coverage of what it has.")
        return notes


def study_coverage(
    run: Run, axes: Sequence[str] = ("segment",), *, by: str | None = None, model: Path | None = None, seed: int = 0
) -> Coverage:
    """Coverage of one run along each of the axes, and crossed with `by`.

    Raises:
        ConfigError: no such axis, or none of them can be used on this run.
    """
    study = Study(run, axes, by=by, model=model)
    study.require_axes()
    return study.measure(seed=seed)


_NO_IDS = "it reads token ids, and the recording kept none (`live: {privacy: ids}` keeps them)"
_BIN_OF = np.array([0, 0, *(int(m - 1).bit_length() for m in range(2, 1 << 12))], dtype=np.uint8)


def _complete(step: Step, whole: Array) -> tuple[Array, Array, Array]:
    """Offsets and ids of the batch in which requests that have unknown tokens, or begin elsewhere, are empty."""
    batch, keep = step.batch, whole[step.low : step.high].copy()
    unknown = batch.ids < 0
    if unknown.any():
        keep &= np.diff(np.concatenate([[0], np.cumsum(unknown)])[batch.offsets]) == 0
    if keep.all():
        return batch.offsets, batch.ids, keep
    lengths = np.where(keep, np.diff(batch.offsets), 0)
    return np.concatenate([[0], np.cumsum(lengths)]), batch.ids[batch.each(keep)], keep


def _context(step: Step, new_from: Array, counted: Array, never: dict[int, lineage.Ranges]) -> Array:
    """uint8 [N]: SEEN, FIRST, NEVER or UNKNOWN."""
    batch = step.batch
    mine = slice(step.low, step.high)
    lengths = np.diff(batch.offsets)
    old = np.minimum(new_from[mine], lengths)
    known = counted[mine]
    parts = np.stack([old, lengths - old], axis=1).ravel()
    codes = np.stack([np.where(known, SEEN, UNKNOWN), np.where(known, FIRST, UNKNOWN)], axis=1).ravel()
    context = np.repeat(codes.astype(np.uint8), parts)
    if never:
        for request in range(step.low, step.high):
            at = int(batch.offsets[request - step.low])
            for a, b in never.get(request, ()):
                context[at + a : at + b] = NEVER
    return context


def _multiplicity(step: Step, reuses: lineage.Reuses, walk: Walk) -> tuple[Array, Array]:
    """Occurrences in traffic that each computed position stands for, its own included: where in the batch the number
    changes, ascending, and what it is before the first change and after each, int64."""
    a, b = np.searchsorted(reuses.request, np.array([step.low, step.high], dtype=reuses.request.dtype))
    offsets = step.batch.offsets
    local = reuses.request[a:b] - step.low
    at = offsets[local] + reuses.position[a:b] - walk.traffic.begin[step.low : step.high][local]
    # Between two steps the number is constant, and after the last step of a request it is one again.
    return at, 1 + np.concatenate([[0], np.cumsum(reuses.step[a:b])])
