"""A library of vectors for the built-in model, and the model by `transformers` under interventions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_probe.paths import shipped
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.steer_ask import Steer
from sglang_probe.steering.apply import Bank, intervene, parts_of
from sglang_probe.steering.library import Library, MadeBy, write
from sglang_probe.steering.plan import rows_of
from sglang_probe.steering.resolve import spec_of

MODEL = shipped("models/probe-text/checkpoint")
WIDTH = 256
POINTS = [f"blocks.{i}.hook_resid_post" for i in range(4)]


def make_library(folder: Path) -> Library:
    """Two directions and a feature, of layers 1 and 2, and a probe of layer 2."""
    generator = torch.Generator().manual_seed(0)

    def random() -> torch.Tensor:
        return torch.randn(WIDTH, generator=generator)

    def add(name: str, layer: int, **tensors: torch.Tensor) -> None:
        feature = "encoder" in tensors
        kind = "feature" if feature else "probe" if "threshold" in tensors else "direction"
        write(
            folder,
            tensors,
            name=name,
            kind=kind,
            hook_point=POINTS[layer],
            model="probe-text",
            model_weight_hash=weight_hash_of_folder(MODEL),
            layer_mean_norm=10.0,
            percentile99=2.0 if feature else None,
            made_by=MadeBy(command="test"),
        )

    add("up", 1, vector=random())
    add("late", 2, vector=random())
    add(
        "feature",
        1,
        vector=random(),
        encoder=random() / 8,
        encoder_bias=torch.tensor(0.1),
        threshold=torch.tensor(0.05),
        decoder_bias=random() / 8,
    )
    add("fires", 2, vector=random(), threshold=torch.tensor(0.0))
    return Library.open(folder)


class Reference:
    """The model by `transformers` in fp32, one sequence at a time and without a cache."""

    def __init__(self, library: Library) -> None:
        from transformers import AutoModelForCausalLM

        self._library = library
        self._model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        vectors = [v for v in library.values() if v.card.kind != "probe"]
        self._bank = Bank.of([parts_of(v.tensors) for v in vectors])
        self._numbers = {v.hash: i + 1 for i, v in enumerate(vectors)}

    def rows(self, ids: Sequence[int], prompt_len: int, steer: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
        """The residual stream after each layer, `[len(ids), WIDTH]` each, under these interventions."""
        spec = spec_of([Steer.model_validate(s) for s in steer], self._library, where="steer")
        plan = rows_of([0], [len(ids)], [prompt_len], [spec], self._numbers)
        found: dict[int, torch.Tensor] = {}

        def hook(layer: int) -> Any:
            def after(_module: Any, _args: Any, output: Any) -> Any:
                x = output[0] if isinstance(output, tuple) else output
                changed = intervene(x[0], plan.get(layer, []), self._bank)
                found[layer] = changed.clone()
                return (changed[None], *output[1:]) if isinstance(output, tuple) else changed[None]

            return after

        handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(self._model.model.layers)]
        try:
            with torch.no_grad():
                self._model(torch.tensor([list(ids)]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return [found[i] for i in range(len(handles))]
