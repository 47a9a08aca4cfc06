"""interp-engine, its eager backend: the only one without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from child import Batches, serve


def load(model: Path, layers: Sequence[int]) -> Batches:
    """One `capture` a batch."""
    import torch
    from interp_engine import Address, capture, load_model

    # It loads models with an attention that keeps the probabilities, if it is not told otherwise.
    options = {"dtype": "float32", "attn_implementation": "sdpa"}
    engine = load_model(str(model), backend="eager", device="cpu", **options)
    points = [Address("resid_post", layer) for layer in layers]

    def batches(prompts: list[list[int]], size: int) -> Iterator[Sequence[Any]]:
        for i in range(0, len(prompts), size):
            with torch.inference_mode():
                found = capture(engine, torch.tensor(prompts[i : i + size]), points)
            yield [found[point].flatten(0, 1) for point in points]

    return batches


if __name__ == "__main__":
    serve(load, ["interp-engine"])
