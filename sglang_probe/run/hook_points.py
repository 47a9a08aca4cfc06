"""Names of hook points, as in TransformerLens, and the engine module behind each.

`hook_q` and `hook_k` are what the rotary embedding takes (after q/k norm, where a model has one), `hook_rot_q` and
`hook_rot_k` what it gives: those attention uses and, of keys, the cache stores. TransformerLens keeps one axis for the
heads; here a row is flat, `[heads * head_dim]`, and `run.rows(..., split_heads=True)` restores the axis. Keys and
values have kv heads, not repeated for the query heads that share them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_probe.errors import ConfigError, UnsupportedError

EMBED = "hook_embed"
RESID_POST = "hook_resid_post"
QUERY, ROTATED_QUERY = "attn.hook_q", "attn.hook_rot_q"
KEY, ROTATED_KEY = "attn.hook_k", "attn.hook_rot_k"
VALUE = "attn.hook_v"
ATTENTION = (QUERY, ROTATED_QUERY, KEY, ROTATED_KEY, VALUE)
_IN_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class HookPoint:
    """A parsed name. `layer` is None for the embedding; `site` is the name within the layer."""

    name: str
    layer: int | None
    site: str

    @property
    def in_attention(self) -> bool:
        """Whether rows are per head."""
        return self.site in ATTENTION


def parse_hook_point(name: str) -> HookPoint:
    """Parse `hook_embed` or `blocks.<layer>.<site>`, site being `hook_resid_post` or one of `ATTENTION`.

    Raises:
        ConfigError: any other name.
    """
    if name == EMBED:
        return HookPoint(name, None, EMBED)
    match = _IN_LAYER.fullmatch(name)
    if match and match.group(2) in (RESID_POST, *ATTENTION):
        return HookPoint(name, int(match.group(1)), match.group(2))
    raise ConfigError(
        f"unknown hook point `{name}`",
        fix=f"use `hook_embed` or `blocks.<layer>.` with one of {', '.join((RESID_POST, *ATTENTION))}, "
        "e.g. blocks.0.hook_resid_post",
    )


def attention_points(names: Iterable[str]) -> list[HookPoint]:
    """Those of `names` whose rows are per head."""
    return [h for h in map(parse_hook_point, names) if h.in_attention]


def check_tensor_parallel(names: Iterable[str], tp_size: int, *, telemetry: bool = False) -> None:
    """Refuse rows per head where each rank has some of the heads only.

    Raises:
        UnsupportedError: names the hook point.
    """
    points = attention_points(names)
    if (points or telemetry) and tp_size > 1:
        what = points[0].name if points else "telemetry"
        raise UnsupportedError(
            f"`{what}` under tensor parallelism (`tp_size: {tp_size}`): each rank has a share of the heads, "
            "and they are not put together yet",
            fix="capture the residual stream alone, or use `tp_size: 1`",
        )


def head_counts(names: Iterable[str], *, heads: int, kv_heads: int, head_dim: int) -> dict[str, list[int]]:
    """`[heads, head_dim]` of every hook point whose rows are per head, for the manifest."""
    points = attention_points(names)
    return {h.name: [heads if h.site in (QUERY, ROTATED_QUERY) else kv_heads, head_dim] for h in points}


REVIEWED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Architectures whose captured rows were compared with `transformers` at every kind of hook point
(tests/end_to_end/test_models.py, tests/end_to_end/test_queries.py)."""


_MLA = (
    "{name} has multi-head latent attention (MLA): its queries are absorbed into the latent space and its cache holds "
    "no keys per head, so that `hook_rot_q` and `hook_rot_k` do not exist"
)
_REFUSED_ARCHITECTURES = {
    "Gemma2": "{name} caps its attention logits, which SGLang's `torch_native` attention does not do: on the CPU "
    "reference platform the engine does not compute the model",
    "Gemma3": "{name} has sliding-window layers that rotate outside their rotary module, and scales embeddings as they "
    "are looked up: neither pre-RoPE rows nor the proof of ownership can be had as of the reviewed ones",
    "DeepseekV2": _MLA,
    "DeepseekV3": _MLA,
}
"""Why architectures are refused that users ask for, by the beginning of their names."""


def check_architecture(name: str) -> None:
    """Refuse to capture rows of an architecture that was not compared with a reference.

    Raises:
        UnsupportedError: names the reviewed ones.
    """
    if name not in REVIEWED_ARCHITECTURES:
        known = next((why for start, why in _REFUSED_ARCHITECTURES.items() if name.startswith(start)), None)
        raise UnsupportedError(
            known.format(name=name)
            if known
            else f"capturing rows of {name} has not been compared with a reference, so they could be another tensor",
            fix=f"set `hook_points: []` to record the ledger alone; reviewed: {', '.join(REVIEWED_ARCHITECTURES)}",
        )


def check_sliding_window(config: Mapping[str, Any], context_length: int) -> None:
    """Refuse a sliding window that SGLang ignores: of the reviewed architectures it gives none a window
    (`models/llama.py`, `qwen2.py`, `qwen3.py`, `mixtral.py`), so that beyond it the engine does not compute the model.

    Args:
        config: the text model's configuration. context_length: longest request that the engine takes.

    Raises:
        UnsupportedError: requests may be longer than the window.
    """
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False or context_length <= int(window):
        return
    if "sliding_attention" not in (config.get("layer_types") or ["sliding_attention"]):
        return
    raise UnsupportedError(
        f"the model is configured with a sliding window of {window} tokens, which SGLang ignores: requests of up to "
        f"{context_length} tokens attend to everything, as the model does not",
        fix=f"set `server: {{context_length: {window}}}` (`--context-length`), or record the ledger alone",
    )


def available(layers: int) -> list[str]:
    """All hook points of the residual stream of a model with this many layers."""
    return [EMBED, *(f"blocks.{i}.{RESID_POST}" for i in range(layers))]


def check_hook_points(names: list[str], layers: int) -> None:
    """Refuse layers that the model does not have.

    Raises:
        ConfigError: the message lists what exists.
    """
    for name in names:
        layer = parse_hook_point(name).layer
        if layer is not None and layer >= layers:
            raise ConfigError(
                f"hook point `{name}`: the model has {layers} layers, numbered 0 to {layers - 1}",
                fix="hook points of this model: "
                + ", ".join(available(layers))
                + f"; and of each layer {', '.join(ATTENTION)}",
            )


def engine_module(name: str) -> str:
    """Path of the engine module whose output a hook point is, for the manifest."""
    point = parse_hook_point(name)
    if point.layer is None:
        return "model.embed_tokens"
    attention = f"model.layers.{point.layer}.self_attn"
    return {
        RESID_POST: f"model.layers.{point.layer} (residual + hidden)",
        QUERY: f"{attention}.rotary_emb (argument query)",
        KEY: f"{attention}.rotary_emb (argument key)",
        ROTATED_QUERY: f"{attention}.attn (argument q)",
        ROTATED_KEY: f"{attention}.attn (argument k)",
        VALUE: f"{attention}.attn (argument v)",
    }[point.site]
