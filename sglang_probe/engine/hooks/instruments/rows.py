"""Taps in the model, and the rows of each forward pass.

SGLang keeps the residual apart from the layer's output: `forward_batch.residual_stream.snapshot` gives their sum,
`hook_resid_post`, without consuming it. Some models return pairs of other meanings instead (Cohere's second tensor is
not a residual to be added), so only architectures that were compared with `transformers` are tapped
(`run/hook_points.py`).

A hook point `hook_scores` is written as `x @ w` in the same place (`steering/scores.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.capture.taps import Taps, head_columns
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.accelerator import check_model, check_recorded, graph_taps
from sglang_probe.engine.hooks.instruments.attention_rows import install_attention_taps
from sglang_probe.engine.hooks.instruments.base import Forward, Instrument, forward_batch_of
from sglang_probe.engine.releases import release
from sglang_probe.run.hook_points import (
    ATTENTION,
    EMBED,
    RESID_POST,
    SCORES,
    attention_points,
    check_hook_points,
    check_rows_of,
    head_counts,
    parse_hook_point,
    parse_pattern,
    score_points,
)
from sglang_probe.run.selection import Selected, expanded, selected_heads
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.steering.scores import told, vectors_of, weights_DK

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig
    from sglang_probe.steering.library import Vector

_CAPACITY = 1024
"""Rows that a buffer is made for at its first use."""


class Rows(Instrument):
    """Captured rows of the hook points that the configuration names."""

    name = "rows"
    features = ("rows",)
    in_model = True

    @classmethod
    def wanted(cls, config: EngineProbeConfig) -> bool:
        return bool(config.hook_points)

    @classmethod
    def needs(cls, config: EngineProbeConfig) -> Sequence[str]:
        in_attention = any(parse_pattern(name).site in ATTENTION for name in config.hook_points)
        return [*cls.features, *(["attention rows"] if in_attention else [])]

    @classmethod
    def serves(cls, started: EngineProbeConfig, asked: EngineProbeConfig) -> bool:
        return (started.hook_points, started.rows, started.scores) == (asked.hook_points, asked.rows, asked.scores)

    def __init__(self, config: EngineProbeConfig) -> None:
        super().__init__(config)
        self._selected = Selected(*expanded(config.rows, config.hook_points, None))
        self.taps: Taps | GraphTaps | None = None
        """Set once the model is loaded."""
        self._heads: dict[str, list[int]] = {}
        self._head_numbers: dict[str, list[int]] = {}
        self._scores: dict[str, list[Vector]] = {}
        self._library = ""
        self._width = self._itemsize = 0
        self.context = 0
        """Positions that the model has, once it is loaded."""

    def attach(self, runner: Any) -> None:
        hook_points = self.config.hook_points
        self._selected = Selected(self.config.rows, hook_points)
        check_model(runner, self.config)
        self._width, self._itemsize = runner.model_config.hidden_size, runner.model_config.dtype.itemsize
        self.context = runner.model_config.context_len
        install_taps(runner.model, hook_points, self)
        self._heads, self._head_numbers = selected_heads(self.config.rows, _heads(runner.model, hook_points))
        if self.config.scores is not None or score_points(hook_points):
            self._scores, self._library = vectors_of(
                self.config.scores,
                hook_points,
                width=runner.model_config.hidden_size,
                layers=len(runner.model.model.layers),
                weight_hash=weight_hash_of_folder(runner.server_args.model_path),
            )
        if guard.active().in_graphs:
            self.taps = graph_taps(runner, hook_points, self._heads, self._columns(), self._weights())
        else:
            self.taps = self._eager_taps(hook_points)

    def open(self, config: EngineProbeConfig, scheduler: Any) -> None:
        super().open(config, scheduler)
        # Taps that are part of recorded graphs stay for as long as the engine does.
        if not isinstance(self.taps, GraphTaps):
            self.taps = self._eager_taps(config.hook_points)

    def row_bytes(self, hook_point: str) -> int:
        """Bytes of a row, once the model is loaded."""
        if hook_point in self._scores:
            return 4 * len(self._scores[hook_point])
        count, head_dim = self._heads.get(hook_point, (1, self._width))
        return count * head_dim * self._itemsize

    def check_captured(self, num_tokens: int) -> None:
        if isinstance(self.taps, GraphTaps):
            check_recorded(self.taps, num_tokens)

    def before(self, forward: Forward) -> None:
        assert self.taps is not None
        self.taps.arm()

    def after(self, forward: Forward) -> None:
        plan, taps = forward.plan, self.taps
        if plan is None or taps is None:
            return
        plan.selected = self._selected.offsets(plan.starts, plan.ends, plan.prompt_lens)
        if isinstance(taps, GraphTaps):
            plan.travelling["rows"] = taps.snapshot(plan.tokens, replayed=forward.replayed, selected=plan.selected)
        else:
            plan.rows = taps.take(plan.tokens, replayed=forward.replayed, selected=plan.selected)

    def library(self) -> tuple[str, str] | None:
        return ("scores", self._library) if self._scores else None

    def facts(self) -> dict[str, Any]:
        return {"heads": self._heads, "head_numbers": self._head_numbers, "scores": told(self._scores)}

    def write(self, hook_point: str, x_ND: torch.Tensor) -> None:
        """Copy what a hook point sees. Inside the model, guarded by the caller."""
        if self.taps is not None:
            self.taps.write(hook_point, x_ND)

    def _eager_taps(self, hook_points: list[str]) -> Taps:
        return Taps(hook_points, capacity=_CAPACITY, columns=self._columns(), weights=self._weights())

    def _weights(self) -> dict[str, torch.Tensor]:
        """Of hook points whose rows are scores, the vectors of these, float32 `[d, k]`."""
        return {point: weights_DK(vectors) for point, vectors in self._scores.items()}

    def _columns(self) -> dict[str, torch.Tensor]:
        """Of hook points that keep some heads only, the columns of these."""
        return {h: head_columns(numbers, self._heads[h][1]) for h, numbers in self._head_numbers.items()}


def install_taps(model: Any, hook_points: list[str], rows: Rows) -> None:
    """Hook the embedding, the decoder layers and their attention.

    Raises:
        UnsupportedError: rows of this architecture have not been compared with a reference.
        ConfigError: a layer does not exist.
    """
    check_rows_of(type(model).__name__, hook_points, release().residual_of, telemetry=False)
    layers = model.model.layers
    check_hook_points(hook_points, len(layers))
    of_layer: dict[int, list[str]] = {}
    for point in map(parse_hook_point, hook_points):
        if point.site == EMBED:
            model.model.embed_tokens.register_forward_hook(_embed_hook(rows, point.name))
        elif point.site in (RESID_POST, SCORES) and point.layer is not None:
            of_layer.setdefault(point.layer, []).append(point.name)
    for layer, names in of_layer.items():  # one sum of the residual stream for both
        layers[layer].register_forward_hook(_layer_hook(rows, names), with_kwargs=True)
    install_attention_taps(layers, attention_points(hook_points), rows.write)


def _heads(model: Any, hook_points: list[str]) -> dict[str, list[int]]:
    points = attention_points(hook_points)
    if not points:
        return {}
    core = model.model.layers[points[0].layer].self_attn.attn
    return head_counts(hook_points, heads=core.tp_q_head_num, kv_heads=core.tp_k_head_num, head_dim=core.head_dim)


def _embed_hook(rows: Rows, name: str) -> Callable[..., None]:
    @guard.tapping
    def write_embedding(_module: Any, _args: Any, output: torch.Tensor) -> None:
        rows.write(name, output)

    return write_embedding


def _layer_hook(rows: Rows, names: list[str]) -> Callable[..., None]:
    def write_residual(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        residual_ND = _residual(args, kwargs, output)
        if residual_ND is not None:
            write(residual_ND)

    @guard.tapping
    def write(residual_ND: torch.Tensor) -> None:
        for name in names:
            rows.write(name, residual_ND)

    return write_residual


def _residual(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor | None:
    """The residual stream after a layer, or None where nobody needs it.

    A sum over tensor-parallel ranks that the layer left open is completed here, by all of them. So a rank takes part
    whether or not it records: one that stopped alone would leave the others waiting for ever.
    """
    session = guard.active()
    if not session.taps_write and session.tp_size == 1:
        return None
    try:
        residual_ND: torch.Tensor = release().residual(forward_batch_of(args, kwargs), output)
        return residual_ND
    except Exception as e:
        session.fail("_residual", e)
        return None
