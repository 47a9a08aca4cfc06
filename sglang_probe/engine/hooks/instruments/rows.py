"""Taps in the model, and the rows of each forward pass.

SGLang keeps the residual apart from the layer's output: `forward_batch.residual_stream.snapshot` gives their sum,
`hook_resid_post`, without consuming it. Some models return pairs of other meanings instead (Cohere's second tensor is
not a residual to be added), so only architectures that were compared with `transformers` are tapped
(`run/hook_points.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.hooks import session as probe
from sglang_probe.engine.hooks.instruments.accelerator import (
    check_captures,
    check_device,
    check_server,
    graph_taps,
    make_taps,
)
from sglang_probe.engine.hooks.instruments.attention_rows import install_attention_taps
from sglang_probe.engine.hooks.instruments.device_telemetry import AcceleratorTelemetry
from sglang_probe.engine.hooks.instruments.telemetry import EngineTelemetry
from sglang_probe.engine.releases import release
from sglang_probe.run.hook_points import (
    EMBED,
    RESID_POST,
    attention_points,
    check_architecture,
    check_hook_points,
    check_sliding_window,
    check_tensor_parallel,
    head_counts,
    parse_hook_point,
)
from sglang_probe.run.selection import selected_heads


def load_model(_result: None, runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `ModelRunner.load_model`: install the taps, before any graph is captured."""
    from sglang.srt.runtime_context import get_parallel

    if runner.is_draft_worker:
        return
    session = probe.active()
    session.tp_size = get_parallel().tp_size
    check_tensor_parallel(session.config.hook_points, session.tp_size, telemetry=session.config.telemetry is not None)
    check_device(runner.device, session.config.accelerator)
    check_server(runner.server_args)
    install_taps(runner.model, session.config.hook_points)
    model_config = runner.model_config
    check_sliding_window(model_config.hf_text_config.to_dict(), model_config.context_len)
    heads = _heads(runner.model, session.config.hook_points)
    session.heads, session.head_numbers = selected_heads(session.config.rows, heads)
    through_graphs = session.config.accelerator == "unproved"
    if through_graphs:
        check_captures(runner)
        if session.config.hook_points:
            session.graph_taps = graph_taps(runner, session.config.hook_points, session.heads, session.kept_columns())
    session.new_taps()
    if session.config.telemetry is not None:
        asked = runner.model.model.layers, session.config.telemetry
        session.telemetry = (
            AcceleratorTelemetry(*asked, functools.partial(make_taps, runner), runner.dtype)
            if through_graphs
            else EngineTelemetry(*asked)
        )
        session.telemetry_layers = session.telemetry.layers


def install_taps(model: Any, hook_points: list[str]) -> None:
    """Hook the embedding, the decoder layers and their attention.

    Raises:
        UnsupportedError: rows of this architecture have not been compared with a reference.
        ConfigError: a layer does not exist.
    """
    check_architecture(type(model).__name__)
    layers = model.model.layers
    check_hook_points(hook_points, len(layers))
    for point in map(parse_hook_point, hook_points):
        if point.site == EMBED:
            model.model.embed_tokens.register_forward_hook(_embed_hook(point.name))
        elif point.site == RESID_POST:
            layers[point.layer].register_forward_hook(_layer_hook(point.name), with_kwargs=True)
    install_attention_taps(layers, attention_points(hook_points))


def _heads(model: Any, hook_points: list[str]) -> dict[str, list[int]]:
    points = attention_points(hook_points)
    if not points:
        return {}
    core = model.model.layers[points[0].layer].self_attn.attn
    return head_counts(hook_points, heads=core.tp_q_head_num, kv_heads=core.tp_k_head_num, head_dim=core.head_dim)


def forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `ModelRunner.forward`: take the rows that the taps wrote."""
    _arm(runner, forward_batch)
    output = original(runner, forward_batch, *args, **kwargs)
    if not runner.is_draft_worker:
        _take(output)
        _measure(runner, forward_batch, output)
    return output


@probe.guarded
def _arm(runner: Any, forward_batch: Any) -> None:
    session = probe.active()
    if session.taps is not None:
        session.taps.arm()
    if session.telemetry is not None and session.current is not None and not runner.is_draft_worker:
        session.telemetry.prepare(runner, forward_batch, session.current)


@probe.guarded
def _take(output: Any) -> None:
    session = probe.active()
    plan, taps = session.current, session.taps
    if plan is None or taps is None or not session.config.hook_points:
        return
    plan.selected = session.selected.offsets(plan.starts, plan.ends, plan.prompt_lens)
    if isinstance(taps, GraphTaps):
        plan.snapshot = taps.snapshot(plan.tokens, replayed=output.can_run_graph, selected=plan.selected)
    else:
        plan.rows = taps.take(plan.tokens, replayed=output.can_run_graph, selected=plan.selected)


@probe.guarded
def _measure(runner: Any, forward_batch: Any, output: Any) -> None:
    session = probe.active()
    if session.current is not None and session.telemetry is not None:
        session.telemetry.measure(runner, forward_batch, session.current, replayed=output.can_run_graph)


def _embed_hook(name: str) -> Callable[..., None]:
    @probe.tapping
    def write_embedding(_module: Any, _args: Any, output: torch.Tensor) -> None:
        taps = probe.active().taps
        if taps is not None:
            taps.write(name, output)

    return write_embedding


def _layer_hook(name: str) -> Callable[..., None]:
    def write_residual(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        residual_ND = _residual(args, kwargs, output)
        if residual_ND is not None:
            write(residual_ND)

    @probe.tapping
    def write(residual_ND: torch.Tensor) -> None:
        taps = probe.active().taps
        if taps is not None:
            taps.write(name, residual_ND)

    return write_residual


def _residual(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor | None:
    """The residual stream behind a layer, or None where nobody needs it.

    A sum over tensor-parallel ranks that the layer left open is completed here, by all of them. So a rank takes part
    whether or not it records: one that stopped alone would leave the others waiting for ever.
    """
    session = probe.active()
    if not session.taps_write and session.tp_size == 1:
        return None
    try:
        residual_ND: torch.Tensor = release().residual(_forward_batch(args, kwargs), output)
        return residual_ND
    except Exception as e:
        session.fail("_residual", e)
        return None


def _forward_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if "forward_batch" in kwargs:
        return kwargs["forward_batch"]
    return next(a for a in args if hasattr(a, "forward_mode"))
