"""`transformers` with forward hooks: batches, no gradients, no logits, nothing kept but the layers that are asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from child import Batches, serve


def load(model: Path, layers: Sequence[int]) -> Batches:
    """The model without its head, cut after the last layer that is asked."""
    import torch
    from transformers import AutoModel

    body = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    body.layers = body.layers[: max(layers) + 1]
    found: dict[int, Any] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            found[layer] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    for layer in layers:
        body.layers[layer].register_forward_hook(keep(layer))

    def batches(prompts: list[list[int]], size: int) -> Iterator[Sequence[Any]]:
        for i in range(0, len(prompts), size):
            with torch.inference_mode():
                body(input_ids=torch.tensor(prompts[i : i + size]), use_cache=False)
            yield [found.pop(layer).flatten(0, 1) for layer in layers]

    return batches


if __name__ == "__main__":
    serve(load, [])
