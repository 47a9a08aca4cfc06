"""How far rounding alone moves a model's rows: the floor under a comparison of rows.

A few rows are decided by rounding. SmolLM2-135M gives the second position of some prompts a residual a hundred times as
long as usual, and in bf16 its length after the last layer is anything from 2,200 to 5,200 where every layer's output is
changed by up to one unit in the last place. Two correct computations differ there by as much as two tokens do, so that
such a row says nothing about its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang_probe.errors import UnsupportedError
from sglang_probe.stats.distance import row_distance

TIMES = 4
"""Computations that are rounded otherwise."""


def blocks(model: Any) -> tuple[Any, Any]:
    """Embedding and layers of a model of `transformers`.

    Raises:
        UnsupportedError: it keeps them under other names.
    """
    inner = getattr(model, "model", None)
    embedding, layers = getattr(inner, "embed_tokens", None), getattr(inner, "layers", None)
    if embedding is None or layers is None:
        raise UnsupportedError(
            f"`transformers` gives a {type(model).__name__}, without `model.embed_tokens` and `model.layers`: its rows "
            "cannot be compared",
            fix="verify without `--transformers`; every other check is asked as before",
        )
    return embedding, layers


def spread(model: Any, rows: Callable[[], dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """The largest relative difference, of each row, between the model as it is and `TIMES` models whose embeddings and
    layers' outputs are changed by up to one unit in the last place, at random from a fixed seed.

    Args:
        model: of `transformers`, with `model.embed_tokens` and `model.layers`.
        rows: runs the model and gives rows `[positions, width]` by hook point.

    Raises:
        UnsupportedError: the model has them under other names.

    Returns:
        Float `[positions]` by hook point, as `stats.distance.row_distance` measures.
    """
    plain = rows()
    most = {name: np.zeros(len(x)) for name, x in plain.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(TIMES):
        with _rounded_otherwise(model, generator):
            for name, x_ND in rows().items():
                most[name] = np.maximum(most[name], row_distance(x_ND, plain[name])[0])
    return most


@contextmanager
def _rounded_otherwise(model: Any, generator: torch.Generator) -> Iterator[None]:
    def change(_module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        unit = torch.finfo(x.dtype).eps
        by = 1 + unit * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)
        y = (x.double() * by).to(x.dtype)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    embedding, layers = blocks(model)
    handles = [m.register_forward_hook(change) for m in (embedding, *layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
