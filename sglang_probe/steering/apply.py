"""The operations on a residual stream `x_ND`, the same for the engine and for the reference by `transformers`.

With v the unit vector of a direction, or of a feature's decoder row w; and z the activation of a feature,
`z = relu(x @ encoder + offset)` where that is past its threshold and else 0, or of a direction the projection `x @ v`:

    add             x + a v                 a: a length
    project_out     x - a (x @ v) v         a: a fraction
    ablate_feature  x - a z w               a: a fraction; the reconstruction's error stays
    clamp           x + (a - z) w           a: the activation (for a direction w is v)
    cap             x + min(a - z, 0) w
    splice          x + a (x^ - x)          a: a fraction; x^: an SAE's reconstruction (`splice.py`)

Of several passes over a layer each sees what the one before left. Sums and products are fp32, row by row, so that a row
has the same bits whatever else is in the batch; the sum of all changes is rounded once to the residual's dtype, and
added. A row whose change is 0 keeps its bits. `splice` multiplies many rows at once: there the last bits may depend on
how many.

In SGLang the residual stream after a layer is the sum of two tensors, `pending` and `residual`: the change is read from
the sum and added to the second, so that in bf16 the last bit of the sum may differ from `x + change`.

Shapes: N rows of a forward, R of them changed, D width of the model, M vectors of the bank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sglang_probe.errors import ConfigError
from sglang_probe.steering.plan import OPS, Rows
from sglang_probe.steering.splice import on_device, splice_changes

if TYPE_CHECKING:
    from sglang_probe.sae.sae import SAE
    from sglang_probe.steering.library import Vector

ADD, PROJECT_OUT, ABLATE, CLAMP, CAP, SPLICE = range(len(OPS))
_ON_ROWS = (PROJECT_OUT, ADD, ABLATE, CLAMP, CAP)
"""Operations that `change` makes."""
_FREE = frozenset((ADD, PROJECT_OUT))
"""Those that no activation is read for."""


@dataclass(frozen=True)
class Parts:
    """The tensors of one vector, as a library has them (float32)."""

    vector: Tensor
    """`[D]`: a direction, or a feature's decoder row."""
    encoder: Tensor | None = None
    """`[D]`: of a feature; None: a direction."""
    encoder_bias: float = 0.0
    threshold: float = 0.0
    decoder_bias: Tensor | None = None
    """`[D]`: taken from the residual before it is encoded; None: nothing is."""


def parts_of(tensors: Mapping[str, Tensor]) -> Parts:
    """The tensors of a library's entry (`steering/library.py`)."""
    bias, threshold = (float(tensors[name]) if name in tensors else 0.0 for name in ("encoder_bias", "threshold"))
    return Parts(tensors["vector"], tensors.get("encoder"), bias, threshold, tensors.get("decoder_bias"))


@dataclass(frozen=True)
class Bank:
    """Vectors side by side, so that a row of a forward names its own by a number. Row 0 changes nothing."""

    write_MD: Tensor
    """Unit vectors."""
    read_MD: Tensor
    """What the activation is read by: the encoder, or the unit vector."""
    offset_M: Tensor
    """Added to what is read."""
    threshold_M: Tensor
    """Past which a feature is active."""
    scale_M: Tensor
    """Length of what an activation of 1 writes."""
    linear_M: Tensor
    """bool: whether the activation is the projection on a direction, of either sign."""
    saes: tuple[SAE, ...] = ()
    """What `splice` reconstructs by; counted from 0."""

    @classmethod
    def of(cls, vectors: Sequence[Parts], *, saes: Sequence[SAE] = (), device: torch.device | str = "cpu") -> Bank:
        """The bank of these vectors; number i is row i + 1.

        Raises:
            ConfigError: a vector is zero or not finite, or their widths differ.
        """
        if not vectors and not saes:
            raise ConfigError("a bank needs a vector")
        width = vectors[0].vector.shape if vectors else torch.Size([saes[0].width])
        if wrong := [s.width for s in saes if (s.width,) != tuple(width)]:
            raise ConfigError(f"an SAE reads rows of width {wrong[0]}, and others have {list(width)}")
        write, read, offset, threshold, scale, linear = (
            [torch.zeros(width)],
            [torch.zeros(width)],
            [0.0],
            [0.0],
            [0.0],
            [True],
        )
        for parts in vectors:
            w = parts.vector.float()
            length = float(w.norm())
            if w.ndim != 1 or w.shape != width:
                raise ConfigError(f"a vector has the shape {list(w.shape)}, and others {list(width)}")
            if not (0 < length < float("inf")):
                raise ConfigError(f"a vector has the length {length}")
            write.append(w / length)
            linear.append(parts.encoder is None)
            if parts.encoder is None:
                read.append(w / length)
                offset.append(0.0)
                scale.append(1.0)
            else:
                e = parts.encoder.float()
                read.append(e)
                bias = 0.0 if parts.decoder_bias is None else float((parts.decoder_bias.double() * e.double()).sum())
                offset.append(parts.encoder_bias - bias)
                scale.append(length)
            threshold.append(max(parts.threshold, 0.0))
        return cls(
            torch.stack(write).to(device),
            torch.stack(read).to(device),
            torch.tensor(offset).to(device),
            torch.tensor(threshold).to(device),
            torch.tensor(scale).to(device),
            torch.tensor(linear).to(device),
            tuple(on_device(s, device) for s in saes),
        )

    def activation(self, x_ND: Tensor, vector_N: Tensor) -> tuple[Tensor, Tensor]:
        """Activations z `[N]` fp32, and where they are active, bool `[N]`."""
        pre = (x_ND.float() * self.read_MD[vector_N]).sum(-1) + self.offset_M[vector_N]
        active = self.linear_M[vector_N] | (pre > self.threshold_M[vector_N])
        return torch.where(active, pre, torch.zeros_like(pre)), active


def bank_of(vectors: Iterable[Vector], *, device: torch.device | str = "cpu") -> tuple[Bank | None, dict[str, int]]:
    """The bank of what can change rows among the entries of a library, and the number of each there by its hash.

    Probes only read, and are left out. Without anything else there is no bank.
    """
    entries = list(vectors)
    usable = [v for v in entries if v.card.kind in ("direction", "feature")]
    saes = [(v.hash, v.sae) for v in entries if v.sae is not None]
    if not usable and not saes:
        return None, {}
    numbers = {v.hash: i + 1 for i, v in enumerate(usable)} | {h: i for i, (h, _) in enumerate(saes)}
    return Bank.of([parts_of(v.tensors) for v in usable], saes=[s for _, s in saes], device=device), numbers


def change(
    x_ND: Tensor,
    vector_N: Tensor,
    op_N: Tensor | None,
    amount_N: Tensor,
    gated_N: Tensor | None,
    bank: Bank,
    ops: Collection[int] = _ON_ROWS,
) -> Tensor:
    """What one pass adds to rows `x_ND`, fp32 `[N, D]`.

    Args:
        vector_N: row of the bank. op_N: number in `plan.OPS`; None: there is one in `ops`. amount_N: float32. gated_N:
            bool; only where the feature is active; None: nowhere.
        ops: numbers that `op_N` can have: what others need is not computed, and no bit depends on it.
    """
    write_ND = bank.write_MD[vector_N]
    z = active = scale = None
    if gated_N is not None or not _FREE.issuperset(ops):
        z, active = bank.activation(x_ND, vector_N)
        scale = bank.scale_M[vector_N]

    def along_of(op: int) -> Tensor:
        if op == PROJECT_OUT:
            return -amount_N * (x_ND.float() * write_ND).sum(-1)
        if op == ADD:
            return amount_N
        assert z is not None
        assert scale is not None
        if op == ABLATE:
            return -amount_N * z * scale
        return (amount_N - z) * scale if op == CLAMP else (amount_N - z).clamp(max=0) * scale

    first, *others = [op for op in _ON_ROWS if op in ops]
    along = along_of(first)
    for op in others:
        assert op_N is not None
        along = torch.where(op_N == op, along_of(op), along)
    if gated_N is not None:
        assert active is not None
        along = torch.where(active | ~gated_N, along, torch.zeros_like(along))
    return along[:, None] * write_ND


def changes(x_ND: Tensor, passes: Sequence[Rows], bank: Bank) -> tuple[Tensor, Tensor]:
    """What all passes over a layer add: rows int64 `[R]`, ascending, and their changes fp32 `[R, D]`.

    Args:
        x_ND: the residual stream after the layer, in the model's dtype. It is not changed.
    """
    numbers = [torch.from_numpy(p.row).to(x_ND.device) for p in passes]
    if len(passes) == 1:
        return numbers[0], _pass(x_ND[numbers[0]], passes[0], bank)
    rows = torch.unique(torch.cat(numbers))
    given = x_ND[rows].float()
    total = torch.zeros_like(given)
    for row, p in zip(numbers, passes, strict=True):
        at = torch.searchsorted(rows, row)
        total[at] += _pass(given[at] + total[at], p, bank)
    return rows, total


def _pass(x_RD: Tensor, p: Rows, bank: Bank) -> Tensor:
    """What one pass adds to its rows, fp32 `[R, D]`."""
    spliced = p.op == SPLICE
    if not spliced.any():
        return _changed(x_RD, p, bank)
    out = torch.zeros_like(x_RD, dtype=torch.float32)
    for which, made in ((spliced, splice_changes), (~spliced, _changed)):
        if which.any():
            at = torch.from_numpy(np.flatnonzero(which)).to(x_RD.device)
            out[at] = made(x_RD[at], p.only(which), bank)
    return out


def _changed(x_RD: Tensor, p: Rows, bank: Bank) -> Tensor:
    def tensor(t: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(t).to(x_RD.device)

    # The host knows which operations there are: each saves a step of every steered decode row.
    ops = set(p.op.tolist())
    op = None if len(ops) == 1 else tensor(p.op)
    gated = tensor(p.gated) if p.gated.any() else None
    return change(x_RD, tensor(p.vector), op, tensor(p.amount), gated, bank, ops)


def add_rows(x_ND: Tensor, rows_R: Tensor, change_RD: Tensor) -> None:
    """Add changes to rows of a tensor, in place and in its dtype; what is changed by 0 keeps its bits."""
    given = x_ND[rows_R]
    rounded = change_RD.to(x_ND.dtype)
    x_ND[rows_R] = torch.where(rounded != 0, given + rounded, given)


def intervene(x_ND: Tensor, passes: Sequence[Rows], bank: Bank) -> Tensor:
    """The residual stream after all passes, a new tensor in its dtype: for a model that holds it as one sum."""
    out = x_ND.clone()
    if passes:
        add_rows(out, *changes(x_ND, passes, bank))
    return out
