"""The kernel in Triton's interpreter (TRITON_INTERPRET=1) beside PyTorch's operations: one line of JSON a case."""

import json

import torch

from sglang_probe.engine.capture.steering_kernel import apply_rows
from sglang_probe.steering.apply import Bank, Parts, change

CASES = ["float32 wide", "bfloat16 wide", "float32 one pass", "bfloat16 narrow"]


def run(name: str) -> dict[str, object]:
    """Random rows of every operation, gated and not, of directions and a feature; some rows of no vector."""
    generator = torch.Generator().manual_seed(len(name))
    dtype = torch.bfloat16 if name.startswith("bfloat16") else torch.float32
    width, passes, n = 24 if name.endswith("narrow") else 200, 1 if "one" in name else 3, 64

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    bank = Bank.of([Parts(random(width)), Parts(random(width), random(width) / 8, 0.1, 0.5, random(width) / 8)])
    numbers = torch.zeros((passes, 4, n + 6), dtype=torch.int32)  # more rows than are asked for
    numbers[:, 0] = torch.randint(0, 3, (passes, n + 6), generator=generator)
    numbers[:, 1] = torch.randint(0, 5, (passes, n + 6), generator=generator)
    numbers[:, 2] = random(passes, n + 6).view(torch.int32)
    numbers[:, 3] = torch.randint(0, 2, (passes, n + 6), generator=generator)
    numbers[:, 0, :8] = 0
    told = numbers[:, :, :n]
    x, to = random(n, width).to(dtype), random(n, width).to(dtype)
    total = torch.zeros((n, width))
    for vector, op, amount, gated in told:
        total += change(x.float() + total, vector.long(), op, amount.contiguous().view(torch.float32), gated != 0, bank)
    rounded = total.to(dtype)
    expected = torch.where(rounded != 0, to + rounded, to)
    found = to.clone()
    apply_rows(x, found, told, bank)
    off = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    return {
        "name": name,
        "off": float(off),
        "changed": float((expected != to).any(1).float().mean()),
        "kept": bool(torch.equal(found[:8], to[:8])),
    }


if __name__ == "__main__":
    for case in CASES:
        print(json.dumps(run(case)), flush=True)
