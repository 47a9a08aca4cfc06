"""Scores in the step: at a hook point `blocks.N.hook_scores`, `x @ w` of the residual stream after layer N.

A column for each vector, in fp32 whatever the model's dtype. A probe fires where its score is above its threshold
(`probe.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sglang_probe.errors import ConfigError
from sglang_probe.run.hook_points import parse_hook_point, score_points
from sglang_probe.steering.config import ScoresConfig
from sglang_probe.steering.library import Library, Vector, check_vector

if TYPE_CHECKING:
    import torch

KINDS = ("probe", "direction")
"""What has a score that is linear in the row."""


def check_given(scores: ScoresConfig | None, hook_points: Iterable[str]) -> None:
    """Refuse scores without a hook point, and such hook points without scores.

    Raises:
        ConfigError: says which is missing.
    """
    points = score_points(hook_points)
    if points and scores is None:
        raise ConfigError(f"`{points[0]}` needs `scores: {{library: FOLDER}}`: whose columns it has")
    if scores is not None and not points:
        raise ConfigError("`scores` has no effect without a hook point `blocks.<layer>.hook_scores`")


def vectors_of(
    scores: ScoresConfig | None, hook_points: Iterable[str], *, width: int, layers: int, weight_hash: str | None
) -> tuple[dict[str, list[Vector]], str]:
    """The vectors of each hook point `hook_scores`, in the order of their names; and the hash of their library.

    Args:
        width, layers, weight_hash: of the model (`library.check_vector`).

    Raises:
        ConfigError: as `check_given`; the library cannot be read or is another one; a name is not in it, has no linear
            score or is of another layer; or a hook point has no vector.
    """
    hook_points = list(hook_points)
    check_given(scores, hook_points)
    if scores is None:
        return {}, ""
    library = Library.open(scores.library)
    if scores.hash not in (None, library.hash):
        raise ConfigError(
            f"the library {scores.library} was changed after the recording was prepared", fix="start it again"
        )
    chosen = [v for v in library.values() if v.card.kind == "probe"]
    if scores.names is not None:
        chosen = [library[name] for name in sorted(set(scores.names))]
    points = score_points(hook_points)
    found: dict[str, list[Vector]] = {p: [] for p in points}
    by_layer = {parse_hook_point(p).layer: p for p in points}
    for v in chosen:
        if v.card.kind not in KINDS:
            raise ConfigError(f"`scores`: `{v.name}` is a {v.card.kind}; {' and '.join(KINDS)}s have scores")
        if v.card.layer in by_layer:
            check_vector(v, width=width, layers=layers, weight_hash=weight_hash)
            found[by_layer[v.card.layer]].append(v)
        elif scores.names is not None:
            raise ConfigError(
                f"`scores`: `{v.name}` is of `{v.card.hook_point}`",
                fix=f"add `blocks.{v.card.layer}.hook_scores` to `hook_points`, or leave the name out",
            )
    if empty := [p for p, vectors in found.items() if not vectors]:
        raise ConfigError(f"`{empty[0]}`: the library {scores.library} has no probe of that layer")
    return found, library.hash


def weights_DK(vectors: Sequence[Vector]) -> torch.Tensor:
    """Their vectors side by side, float32 `[d, k]`."""
    import torch

    return torch.stack([v.vector for v in vectors], dim=1)


def told(vectors: Mapping[str, Sequence[Vector]]) -> dict[str, dict[str, str]]:
    """For the manifest: by hook point, the hash of each column's vector by its name, in the order of the columns."""
    return {point: {v.name: v.hash for v in of} for point, of in vectors.items()}


def write_weights(path: Any, vectors: Mapping[str, Sequence[Vector]]) -> None:
    """Keep the vectors with a run, so that its scores can be computed again from its rows: float32 `[d]` by name."""
    from safetensors.torch import save_file

    from sglang_probe.run import journal

    tensors = {v.name: v.vector.contiguous() for of in vectors.values() for v in of}
    journal.write_durably(path, lambda temporary: save_file(tensors, temporary))
