"""From the positions of a forward pass to its rows: which are changed, by which vector, and by how much.

Everything goes by the absolute position in the sequence, so that chunks, mixed batches, retractions and prefix hits
need no case of their own. Host integers and numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sglang_probe.steering.spec import Spec, Step

Array = np.ndarray[Any, Any]

OPS = ("add", "project_out", "ablate_feature", "clamp", "cap", "splice")
"""Operations by the number that `Rows.op` has."""
_NUMBER = {op: i for i, op in enumerate(OPS)}


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a forward pass that one pass over a layer changes; n of them, each at most once."""

    row: Array
    """int64 `[n]`, ascending within a request."""
    vector: Array
    """int64 `[n]`: row of the bank (`apply.Bank`), or of `splice` the number of the SAE."""
    op: Array
    """int64 `[n]`: number in `OPS`."""
    amount: Array
    """float32 `[n]`."""
    gated: Array
    """bool `[n]`."""
    position: Array
    """int64 `[n]`: of the row in its sequence."""
    random: Array
    """int64 `[n]`: seed of the direction of a spliced row's error; -1: as it is."""

    def __len__(self) -> int:
        return len(self.row)

    def only(self, which: Array) -> Rows:
        """Those that a mask names."""
        return Rows(*(getattr(self, f.name)[which] for f in fields(self)))


def rows_of(
    starts: Sequence[int],
    ends: Sequence[int],
    prompt_lens: Sequence[int],
    specs: Sequence[Spec | None],
    numbers: Mapping[str, int],
) -> dict[int, list[Rows]]:
    """By layer, the passes that change its residual stream, in the order in which they act.

    Args:
        starts, ends: positions `[starts[i], ends[i])` that the forward computes of request i, in batch order.
        specs: the interventions of each request; None: none.
        numbers: row of the bank of each vector, and number of each SAE, by its hash.
    """
    passes: dict[int, list[_Pass]] = {}
    offset = 0
    for start, end, prompt_len, spec in zip(starts, ends, prompt_lens, specs, strict=True):
        if spec is not None:
            turn: dict[int, int] = {}
            for step, where in spec.schedule(prompt_len):
                pieces = [(max(a, start), min(b, end)) for a, b in where if a < end and b > start]
                if not pieces:
                    continue
                layer = step.layer
                k = turn[layer] = turn.get(layer, -1) + 1
                of_layer = passes.setdefault(layer, [])
                if k == len(of_layer):
                    of_layer.append(_Pass())
                for a, b in pieces:
                    of_layer[k].add(offset + a - start, offset + b - start, a, step, numbers[step.hash])
        offset += end - start
    return {layer: [p.rows() for p in of_layer] for layer, of_layer in passes.items()}


class _Pass:
    """Ranges of rows, until they are arrays."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, int, int, int, float, bool, int]] = []

    def add(self, first: int, end: int, position: int, step: Step, number: int) -> None:
        random = -1 if step.random_error is None else step.random_error
        self._ranges.append((first, end, position, number, _NUMBER[step.op], step.amount, step.gated, random))

    def rows(self) -> Rows:
        columns = (np.array(x) for x in zip(*self._ranges, strict=True))
        first, end, position, number, op, amount, gated, random = columns
        if (end - first == 1).all():  # a decode step: nothing is spread over rows
            return Rows(
                row=first.astype(np.int64),
                vector=number.astype(np.int64),
                op=op.astype(np.int64),
                amount=amount.astype(np.float32),
                gated=gated.astype(bool),
                position=position.astype(np.int64),
                random=random.astype(np.int64),
            )
        lengths = end - first
        before = np.cumsum(lengths) - lengths
        counted = np.arange(int(lengths.sum()), dtype=np.int64)
        return Rows(
            row=counted + np.repeat(first - before, lengths),
            vector=np.repeat(number.astype(np.int64), lengths),
            op=np.repeat(op.astype(np.int64), lengths),
            amount=np.repeat(amount.astype(np.float32), lengths),
            gated=np.repeat(gated.astype(bool), lengths),
            position=counted + np.repeat(position - before, lengths),
            random=np.repeat(random.astype(np.int64), lengths),
        )
