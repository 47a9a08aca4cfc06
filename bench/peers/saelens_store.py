"""SAELens' `ActivationsStore`, over the same model by `AutoModelForCausalLM`, several hooks in one forward.

Its own `CacheActivationsRunner` writes one hook point only, so rows are written as the other peers write theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from child import Batches, serve


def load(model: Path, layers: Sequence[int]) -> Batches:
    """The store hooks what it is told to, and computes logits, which it does not need."""
    import torch
    from datasets import Dataset
    from sae_lens.load_model import load_model
    from sae_lens.training.activations_store import ActivationsStore

    names = [f"model.layers.{layer}" for layer in layers]
    options = {"dtype": torch.float32}
    hooked = load_model("AutoModelForCausalLM", str(model), "cpu", options, hook_names=names)
    width = hooked.model.config.hidden_size

    def batches(prompts: list[list[int]], size: int) -> Iterator[Sequence[Any]]:
        length = len(prompts[0])
        store = ActivationsStore.from_config_multi_hook(
            hooked,
            dataset=Dataset.from_dict({"input_ids": prompts}),
            hook_names=names,
            hook_d_ins=dict.fromkeys(names, width),
            streaming=False,
            context_size=length,
            store_batch_size_prompts=size,
            total_training_tokens=len(prompts) * length,
            prepend_bos=False,
        )
        for _ in range(0, len(prompts), size):
            found = store.get_multi_hook_activations(store.get_batch_tokens())
            yield [found[name].flatten(0, 1) for name in names]

    return batches


if __name__ == "__main__":
    serve(load, ["sae-lens", "transformer-lens"])
