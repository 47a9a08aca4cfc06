"""`steering.apply.change` of every pass over a layer on a GPU: one Triton kernel, one program a row.

A graph does the same whatever is asked, and in PyTorch that is some twenty operations a pass over all rows, 7 % of a
step of 5 ms (docs/evidence/gpu-results.md). Here a row that nobody changes reads its numbers and ends.

It has been run in Triton's interpreter and compiled for GPUs (test_steering_kernel.py), not run on one. Sums are over
the whole row in fp32, in the kernel's own order: a changed row may differ from PyTorch's in the last bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sglang_probe.steering.apply import ABLATE, ADD, CAP, CLAMP, PROJECT_OUT, Bank

assert (ADD, PROJECT_OUT, ABLATE, CLAMP, CAP) == (0, 1, 2, 3, 4)  # as the kernel has them


def apply_rows(x_ND: Tensor, to_ND: Tensor, told_P4N: Tensor, bank: Bank) -> None:
    """Add to rows of `to_ND`, in place, what `passes` say. Enqueues work only.

    Args:
        x_ND: the residual stream after the layer.
        to_ND: the tensor to which the change is added, of the same dtype.
        told_P4N: by pass and row: number of the vector, operation, bits of the float32 amount, gate; int32.
    """
    n, d = x_ND.shape
    passes = told_P4N.shape[0]
    assert x_ND.stride(1) == to_ND.stride(1) == told_P4N.stride(2) == 1
    _apply[(n,)](
        x_ND,
        to_ND,
        told_P4N,
        bank.write_MD,
        bank.read_MD,
        bank.offset_M,
        bank.threshold_M,
        bank.scale_M,
        bank.linear_M,
        x_ND.stride(0),
        to_ND.stride(0),
        told_P4N.stride(0),
        told_P4N.stride(1),
        D=d,
        BLOCK=triton.next_power_of_2(d),
        PASSES=passes,
        num_warps=8 if d > 1024 else 4,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _apply(  # type: ignore[no-untyped-def]
    x,
    to,
    told,
    write,
    read,
    offset,
    threshold,
    scale,
    linear,
    x_stride,
    to_stride,
    pass_stride,
    number_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PASSES: tl.constexpr,
):
    row = tl.program_id(0)
    asked = 0
    for p in tl.static_range(PASSES):
        asked += tl.load(told + p * pass_stride + row)
    if asked > 0:  # vector 0 changes nothing
        d = tl.arange(0, BLOCK)
        inside = d < D
        given = tl.load(x + row.to(tl.int64) * x_stride + d, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for p in tl.static_range(PASSES):
            vector = tl.load(told + p * pass_stride + row)
            op = tl.load(told + p * pass_stride + number_stride + row)
            amount = tl.load(told + p * pass_stride + 2 * number_stride + row).to(tl.float32, bitcast=True)
            gated = tl.load(told + p * pass_stride + 3 * number_stride + row)
            w = tl.load(write + vector.to(tl.int64) * D + d, mask=inside, other=0.0)
            r = tl.load(read + vector.to(tl.int64) * D + d, mask=inside, other=0.0)
            now = given + total
            pre = tl.sum(now * r, 0) + tl.load(offset + vector)
            active = (tl.load(linear + vector) != 0) | (pre > tl.load(threshold + vector))
            z = tl.where(active, pre, 0.0)
            length = tl.load(scale + vector)
            along = tl.where(op == 0, amount, -amount * tl.sum(now * w, 0))
            along = tl.where(op == 2, -amount * z * length, along)
            along = tl.where(op == 3, (amount - z) * length, along)
            along = tl.where(op == 4, tl.minimum(amount - z, 0.0) * length, along)
            along = tl.where(active | (gated == 0), along, 0.0)
            total += along * w
        at = to + row.to(tl.int64) * to_stride + d
        before = tl.load(at, mask=inside, other=0.0)
        rounded = total.to(before.dtype).to(tl.float32)
        changed = (before.to(tl.float32) + rounded).to(before.dtype)
        tl.store(at, tl.where(rounded != 0, changed, before), mask=inside)
