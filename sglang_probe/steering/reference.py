"""A `transformers` model under the interventions of a request: what an engine should have computed.

The whole sequence goes through the model at once, so that a row's number is its absolute position, and the plan of
one forward over `[0, T)` says what is changed (`steering/plan.py`). An engine that computed it in chunks, with a
prefix from the cache or token by token, must have changed the same rows.

SGLang keeps the residual stream after a layer as a sum of two tensors and adds the change to one of them, so that in
bf16 it rounds `(residual + change) + mlp`. Where a layer of `transformers` shows these two, the same is done here; else
the change is added to their sum, which differs in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang_probe.steering.apply import SPLICE, Bank, add_rows, bank_of, changes, intervene
from sglang_probe.steering.library import Vector
from sglang_probe.steering.plan import OPS, Rows, rows_of
from sglang_probe.steering.spec import Spec
from sglang_probe.steering.splice import undecided

_LINEAR = torch.tensor([OPS.index("add"), OPS.index("project_out")])
"""Operations that do not ask whether a feature is active."""


@dataclass(frozen=True)
class Vectors:
    """Vectors of libraries by their hashes, as `apply` takes them."""

    bank: Bank
    numbers: Mapping[str, int]

    @classmethod
    def of(cls, vectors: Sequence[Vector]) -> Vectors | None:
        """Of those that can change rows; None without any."""
        bank, numbers = bank_of(vectors)
        return None if bank is None else cls(bank, numbers)

    def lacks(self, spec: Spec) -> str | None:
        """Name of a vector that a specification needs and that is not here, or of an operation that is not one on
        rows; None: all are."""
        lacking = (
            s.vector if s.op in OPS else s.op for s in spec.steps if s.hash not in self.numbers or s.op not in OPS
        )
        return next(lacking, None)


@dataclass
class Close:
    """Rows that rounding may decide: a feature is so near its threshold that two correct computations may differ in
    whether it is active, and then in the change."""

    tolerance: Callable[[int], float]
    """By layer: relative error of a row that is still correct."""
    first: int | None = None
    """First position of such a row. What follows it depends on it."""
    rows: int = 0

    def note(self, x_ND: Tensor, layer: int, passes: Sequence[Rows], bank: Bank) -> None:
        """Look at the rows that a layer is about to change. Each pass sees what the one before left."""
        for p in passes:
            self._note_spliced(x_ND, layer, p, bank)
            some = p.op != SPLICE
            row, vector, op, gated = (torch.from_numpy(t[some]) for t in (p.row, p.vector, p.op, p.gated))
            # Without a gate, an activation that begins at 0 changes a row without a jump.
            jumps = ~torch.isin(op, _LINEAR) & (bank.threshold_M[vector] > 0)
            sharp = ~bank.linear_M[vector] & (jumps | gated)
            x, read = x_ND[row].float(), bank.read_MD[vector]
            pre = (x * read).sum(-1) + bank.offset_M[vector]
            # An error of random direction has so much of its length along the encoder; four deviations of it.
            reach = 4 * self.tolerance(layer) * x.norm(dim=1) * read.norm(dim=1) / x.shape[1] ** 0.5
            self._add(row[sharp & ((pre - bank.threshold_M[vector]).abs() <= reach)], len(x_ND))
            if p is not passes[-1]:
                x_ND = intervene(x_ND, [p], bank)

    def _note_spliced(self, x_ND: Tensor, layer: int, p: Rows, bank: Bank) -> None:
        for number in np.unique(p.vector[p.op == SPLICE]):
            row = torch.from_numpy(p.row[(p.op == SPLICE) & (p.vector == number)])
            self._add(row[undecided(x_ND[row], bank.saes[int(number)], self.tolerance(layer))], len(x_ND))

    def _add(self, near: Tensor, length: int) -> None:
        if len(near):
            self.rows += len(near)
            self.first = min(int(near.min()), length if self.first is None else self.first)


@contextmanager
def intervened(
    model: Any, spec: Spec, prompt_len: int, vectors: Vectors, *, close: Close | None = None
) -> Iterator[None]:
    """While this is open, forwards of `model` over a whole sequence `[1, T]` are those under the interventions of a
    request. Hooks that are registered inside see the changed rows.

    Args:
        model: a causal model of `transformers`, whose decoder layers are `model.model.layers`, on the CPU.
        close: told of the rows that rounding may decide.

    Raises:
        KeyError: the specification needs what `vectors` lacks (`Vectors.lacks`).
    """

    @cache
    def plan(length: int) -> dict[int, list[Rows]]:
        return rows_of([0], [length], [prompt_len], [spec], vectors.numbers)

    handles = []
    for layer in sorted({s.layer for s in spec.steps}):
        module = model.model.layers[layer]
        summands = _Summands()
        handles += summands.watch(module)

        def change(_module: Any, _args: Any, output: Any, layer: int = layer, summands: _Summands = summands) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            passes = plan(x.shape[1]).get(layer)
            if not passes:
                return None
            if close is not None:
                close.note(x[0], layer, passes, vectors.bank)
            out = changed(x[0], passes, vectors.bank, summands.of(x[0]))[None]
            return (out, *output[1:]) if isinstance(output, tuple) else out

        handles.append(module.register_forward_hook(change))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def changed(x_ND: Tensor, passes: Sequence[Rows], bank: Bank, summands: tuple[Tensor, Tensor] | None) -> Tensor:
    """The residual stream after all passes, a new tensor: `(residual + change) + mlp`, or `x + change` where the
    summands are not known. Rows of no change keep their bits."""
    rows, change_RD = changes(x_ND, passes, bank)
    out = x_ND.clone()
    if summands is None:
        add_rows(out, rows, change_RD)
        return out
    residual = summands[0].clone()
    add_rows(residual, rows, change_RD)
    out[rows] = (residual + summands[1])[rows]
    return out


@dataclass
class _Summands:
    """What the last sum of a decoder layer is made of, in models that are built like Llama."""

    residual: Tensor | None = None
    mlp: Tensor | None = None

    def watch(self, layer: Any) -> list[Any]:
        norm, mlp = (getattr(layer, name, None) for name in ("post_attention_layernorm", "mlp"))
        if norm is None or mlp is None:
            return []

        def before(_module: Any, args: Any) -> None:
            self.residual = args[0]

        def after(_module: Any, _args: Any, output: Any) -> None:
            self.mlp = output[0] if isinstance(output, tuple) else output

        return [norm.register_forward_pre_hook(before), mlp.register_forward_hook(after)]

    def of(self, x_ND: Tensor) -> tuple[Tensor, Tensor] | None:
        """Both, if their sum is the layer's output, bit for bit."""
        residual, mlp = self.residual, self.mlp
        self.residual = self.mlp = None
        if residual is None or mlp is None or residual.numel() != x_ND.numel() or mlp.numel() != x_ND.numel():
            return None
        found = residual.reshape(x_ND.shape), mlp.reshape(x_ND.shape)
        return found if torch.equal(found[0] + found[1], x_ND) else None
