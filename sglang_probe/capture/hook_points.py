"""Names of hook points, as in TransformerLens, and the engine module behind each."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sglang_probe.errors import ConfigError, UnsupportedError

EMBED = "hook_embed"
_RESID_POST = re.compile(r"blocks\.(\d+)\.hook_resid_post")


@dataclass(frozen=True)
class HookPoint:
    """A parsed name. `layer` is None for the embedding."""

    name: str
    layer: int | None


def parse_hook_point(name: str) -> HookPoint:
    """Parse `hook_embed` or `blocks.<layer>.hook_resid_post`.

    Raises:
        ConfigError: any other name.
    """
    if name == EMBED:
        return HookPoint(name, None)
    if match := _RESID_POST.fullmatch(name):
        return HookPoint(name, int(match.group(1)))
    raise ConfigError(
        f"unknown hook point `{name}`",
        fix="use `hook_embed` or `blocks.<layer>.hook_resid_post`, e.g. blocks.0.hook_resid_post",
    )


REVIEWED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures whose captured residual stream was compared with `transformers` (tests/engine/test_models.py)."""


def check_architecture(name: str) -> None:
    """Refuse to capture rows of an architecture that was not compared with a reference.

    Raises:
        UnsupportedError: names the reviewed ones.
    """
    if name not in REVIEWED_ARCHITECTURES:
        raise UnsupportedError(
            f"capturing rows of {name} has not been compared with a reference, so they could be another tensor",
            fix=f"set `hook_points: []` to record the ledger alone; reviewed: {', '.join(REVIEWED_ARCHITECTURES)}",
        )


def available(layers: int) -> list[str]:
    """All hook points of a model with this many layers."""
    return [EMBED, *(f"blocks.{i}.hook_resid_post" for i in range(layers))]


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
                fix="hook points of this model: " + ", ".join(available(layers)),
            )


def engine_module(name: str) -> str:
    """Path of the engine module whose output a hook point is, for the manifest."""
    layer = parse_hook_point(name).layer
    return "model.embed_tokens" if layer is None else f"model.layers.{layer} (residual + hidden)"
