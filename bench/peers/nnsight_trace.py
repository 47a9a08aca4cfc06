"""nnsight: a trace over the model without its head that ends at the last layer that is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from child import Batches, serve


def load(model: Path, layers: Sequence[int]) -> Batches:
    """One trace a batch."""
    import torch
    from nnsight import NNsight
    from transformers import AutoModel

    body = NNsight(AutoModel.from_pretrained(model, dtype=torch.float32).eval())
    wanted = sorted(layers)
    assert list(layers) == wanted, "a trace asks for modules in the order in which they run"

    def batches(prompts: list[list[int]], size: int) -> Iterator[Sequence[Any]]:
        for i in range(0, len(prompts), size):
            ids = torch.tensor(prompts[i : i + size])
            found: list[Any] = []
            with torch.inference_mode(), body.trace(input_ids=ids, use_cache=False) as tracer:
                for layer in wanted:
                    found.append(body.layers[layer].output.save())  # noqa: PERF401 (nnsight rewrites this block)
                tracer.stop()
            yield [(x if isinstance(x, torch.Tensor) else x[0]).flatten(0, 1) for x in found]

    return batches


if __name__ == "__main__":
    serve(load, ["nnsight"])
